// Shows the report of prolora's nodes on the node itself, below its widgets.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const SHOWN = "shown report";

function showReport(node, text) {
  let widget = node.widgets?.find((candidate) => candidate.name === SHOWN);
  if (!widget) {
    const made = ComfyWidgets.STRING(node, SHOWN, ["STRING", { multiline: true }], app);
    widget = made.widget;
    widget.label = "report";
    widget.serialize = false; // neither in the workflow nor in the prompt
    widget.options = { ...widget.options, serialize: false };
    widget.serializeValue = () => undefined;
    const element = widget.inputEl ?? widget.element;
    if (element) element.readOnly = true;
  }
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height + 80)]);
  app.graph.setDirtyCanvas(true, false);
}

app.registerExtension({
  name: "prolora.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Prolora")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (output?.text) showReport(this, output.text.join(""));
    };
  },
});
