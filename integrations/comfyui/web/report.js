// Labels prolora's nodes, folds what is advanced, fills in what a LoRA tells, and shows the report.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const WIDTH = 460;
const [LEAST_HEIGHT, MOST_HEIGHT] = [140, 320];
const SHOWN = "shown report";
const OPEN = "open the whole report";

function isOurs(node) {
  return node?.comfyClass?.startsWith("Prolora");
}

function findWidget(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

// Neither in the workflow nor in the prompt.
function keepOut(widget) {
  widget.serialize = false;
  widget.options = { ...widget.options, serialize: false };
  widget.serializeValue = () => undefined;
}

function showReport(node, text) {
  let widget = findWidget(node, SHOWN);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, SHOWN, ["STRING", { multiline: true }], app).widget;
    widget.label = "report";
    keepOut(widget);
    widget.options.getMinHeight = () => widget.reportHeight;
    const element = findField(widget);
    if (element) {
      element.readOnly = true;
      Object.assign((element.style ??= {}), { fontSize: "12px", fontFamily: "sans-serif" });
    }
  }
  widget.value = text;
  // As high as its text, up to a limit. A field's scrollHeight is never less than its own height.
  const field = findField(widget), height = field?.style.height;
  if (field) field.style.height = "0px";
  widget.reportHeight = Math.min(Math.max(field?.scrollHeight ?? 0, LEAST_HEIGHT), MOST_HEIGHT);
  if (field) field.style.height = height;
}

function findField(widget) {
  return widget.inputEl ?? widget.element;
}

function showLink(node, page) {
  let widget = findWidget(node, OPEN);
  if (!widget) {
    widget = node.addWidget("button", OPEN, null, () => window.open(widget.page, "_blank"));
    keepOut(widget);
    widget.tooltip = "All numbers and pictures of the report, in a new tab.";
  }
  widget.page = api.apiURL(`/prolora/report?name=${encodeURIComponent(page)}`);
  widget.hidden = !page;
}

// Labels as people read them. Some versions of ComfyUI do this themselves; none explains a field
// of several lines.
function label(node) {
  for (const widget of node.widgets ?? []) {
    const known = findInput(node, widget)?.[1];
    if (known?.display_name) widget.label = known.display_name;
    const field = findField(widget);
    if (field && known?.tooltip) field.title = known.tooltip;
  }
}

function findInput(node, widget) {
  return node.constructor.nodeData?.input?.required?.[widget.name];
}

// The LoRA that is chosen tells the model that it was trained on, or the label says to choose.
function fillTrainedOn(node) {
  const [lora, trainedOn] = ["lora", "trained_on"].map((name) => findWidget(node, name));
  if (!lora || !trainedOn) return;
  const before = lora.callback;
  const chosenBefore = trainedOn.callback;
  const [fromLora] = findInput(node, trainedOn)[0];
  let filledIn = trainedOn.value; // what people chose is another value, and stays
  trainedOn.callback = function () {
    trainedOn.label = "trained on";
    return chosenBefore?.apply(this, arguments);
  };
  lora.callback = async function (chosen) {
    before?.apply(this, arguments);
    const shown = trainedOn.value;
    const answer = await api.fetchApi(`/prolora/trained_on?lora=${encodeURIComponent(chosen)}`);
    const { name } = answer.ok ? await answer.json() : {};
    if (lora.value !== chosen || trainedOn.value !== shown) return;
    if (name || trainedOn.value === filledIn) trainedOn.value = filledIn = name ?? fromLora;
    const open = name === null && trainedOn.value === fromLora;
    trainedOn.label = open ? "trained on (not found: choose)" : "trained on";
    app.graph?.setDirtyCanvas(true, false);
  };
}

function fold(widget, folded) {
  widget.hidden = folded;
  (widget.options ??= {}).hidden = folded; // there some versions of "Nodes 2.0" look
  // Versions that hide a widget may still leave its room.
  if (folded) widget.computeSize = () => [0, -4];
  else delete widget.computeSize;
}

// A button below the widgets shows those that few people need.
function foldAdvanced(node) {
  const advanced = (node.widgets ?? []).filter((w) => findInput(node, w)?.[1].folded);
  if (!advanced.length) return;
  let folded = false;
  const button = node.addWidget("button", "settings", null, turn);
  keepOut(button);
  button.tooltip = "Shows and hides what few people need; what is chosen there counts either way.";
  function turn() {
    const before = node.computeSize()[1];
    folded = !folded;
    advanced.forEach((widget) => fold(widget, folded));
    button.label = folded ? "more settings ▸" : "fewer settings ▾";
    node.setSize([node.size[0], node.size[1] + node.computeSize()[1] - before]);
    app.graph?.setDirtyCanvas(true, false);
  }
  turn();
}

function makeRoom(node) {
  const [width, height] = node.computeSize();
  // "Nodes 2.0" writes larger, and gives a report what it finds.
  const room = window.LiteGraph?.vueNodesMode ? (findWidget(node, SHOWN)?.reportHeight ?? 0) : 0;
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height + room)]);
  app.graph?.setDirtyCanvas(true, false);
}

function showResult(node, text, page) {
  showReport(node, text);
  showLink(node, page);
  makeRoom(node);
}

function sayOn(id, text) {
  const node = app.graph?.getNodeById(id);
  if (isOurs(node)) showResult(node, text, "");
}

// Some versions of ComfyUI say no more than that a job failed.
api.addEventListener("execution_error", ({ detail }) =>
  sayOn(detail.node_id, `✖ ${detail.exception_message.trim()}`),
);
api.addEventListener("execution_interrupted", ({ detail }) => sayOn(detail.node_id, "✖ Stopped."));
api.addEventListener("prolora.progress", ({ detail }) => sayOn(detail.node, detail.text));

app.registerExtension({
  name: "prolora.report",
  nodeCreated(node) {
    if (!isOurs(node)) return;
    label(node);
    fillTrainedOn(node);
    foldAdvanced(node);
    node.setSize([WIDTH, node.computeSize()[1]]);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Prolora")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (!output?.text) return;
      showResult(this, output.text.join(""), output.page?.[0] ?? "");
    };
  },
});
