"""The script of the nodes, under Node.js, on a stand-in of what ComfyUI has in the browser."""

import json
import subprocess
from pathlib import Path

from backends import find_node

SCRIPT = Path(__file__).parents[2] / "integrations" / "comfyui" / "web" / "report.js"

STAND_IN = """
const fs = require("fs");
const source = fs.readFileSync(process.argv[1], "utf8").replace(/^import .*$/gm, "");
const listeners = {}, nodes = {}, answers = {};
let extension;
const app = {
  graph: { setDirtyCanvas() {}, getNodeById: (id) => nodes[id] },
  registerExtension(known) { extension = known; },
};
const api = {
  apiURL: (path) => path,
  addEventListener(name, listener) { listeners[name] = listener; },
  async fetchApi(path) {
    const lora = decodeURIComponent(path.split("lora=")[1]);
    return { ok: lora in answers, json: async () => ({ name: answers[lora] }) };
  },
};
const ComfyWidgets = {
  STRING(node, name) {
    const widget = { name, element: {} };
    node.widgets.push(widget);
    return { widget };
  },
};
new Function("app", "api", "ComfyWidgets", "window", source)(app, api, ComfyWidgets, {});

class ProloraNode {
  static nodeData = { name: "ProloraMoveLora", input: { required: {
    lora: [["choose", "a", "b", "c"], { display_name: "LoRA" }],
    trained_on: [["from the LoRA", "base", "mine"], { display_name: "trained on" }],
    method: [["auto"], { folded: true }],
    prompt: ["STRING", { multiline: true, tooltip: "What to draw." }],
  } } };
  comfyClass = "ProloraMoveLora";
  size = [100, 50];
  constructor() {
    const inputs = Object.entries(ProloraNode.nodeData.input.required);
    this.widgets = inputs.map(([name, [values, { multiline }]]) => ({
      name, value: values[0], options: {}, ...(multiline && { element: {} }) }));
  }
  computeSize() { return [100, 20 * this.widgets.length]; }
  setSize(size) { this.size = size; }
  addWidget(type, name, value, callback) {
    const widget = { type, name, callback, options: {} };
    this.widgets.push(widget);
    return widget;
  }
  find(name) { return this.widgets.find((widget) => widget.name === name); }
}
extension.beforeRegisterNodeDef(ProloraNode, ProloraNode.nodeData);
const node = (nodes[5] = new ProloraNode());
extension.nodeCreated(node);
async function choose(name, value) {
  node.find(name).value = value;
  await node.find(name).callback?.(value);
}
"""


def run(body):
    """What `body` returns, with `node` on the canvas."""
    code = f"{STAND_IN}\n(async () => {{ {body} }})().then(v => console.log(JSON.stringify(v)))"
    done = subprocess.run(
        [find_node(), "-e", code, str(SCRIPT)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_refusal_stands_on_its_node():
    said, page, other = run("""
        const fail = (id) => listeners.execution_error(
          { detail: { node_id: id, exception_message: "Choose a LoRA.\\n" } });
        node.onExecuted({ text: ["done"], page: ["a.html"] });
        fail(5);
        nodes[6] = { comfyClass: "KSampler", widgets: [] };
        fail(6); fail(7);
        return [node.find("shown report").value, node.find("open the whole report").hidden,
                nodes[6].widgets.length];
    """)
    assert said == "✖ Choose a LoRA." and page and other == 0


def test_a_node_shows_how_far_it_is_until_it_is_done_or_stopped():
    shown = run("""
        const shown = [], look = () => shown.push(node.find("shown report").value);
        const tell = (text) => listeners["prolora.progress"]({ detail: { node: "5", text } });
        nodes["5"] = node;
        tell("Working: 25% done."); look();
        node.onExecuted({ text: ["done"], page: [] }); look();
        tell("Working: 50% done."); look();
        listeners.execution_interrupted({ detail: { node_id: "5" } }); look();
        return shown;
    """)
    assert shown == ["Working: 25% done.", "done", "Working: 50% done.", "✖ Stopped."]


def test_the_model_that_a_lora_tells_is_filled_in_and_a_missing_one_is_asked_for():
    shown = run("""
        const shown = [];
        Object.assign(answers, { a: "base", b: null });
        for (const [name, value] of [["lora", "a"], ["lora", "b"], ["trained_on", "mine"]]) {
          await choose(name, value);
          shown.push([node.find("trained_on").value, node.find("trained_on").label]);
        }
        return shown;
    """)
    assert shown == [
        ["base", "trained on"],
        ["from the LoRA", "trained on (not found: choose)"],
        ["mine", "trained on"],
    ]


def test_a_model_that_was_chosen_before_stays_where_a_lora_tells_of_none():
    shown = run("""
        Object.assign(answers, { a: "base", b: null });
        const shown = [];
        for (const [name, value] of [["trained_on", "mine"], ["lora", "b"], ["lora", "a"]]) {
          await choose(name, value);
          shown.push([node.find("trained_on").value, node.find("trained_on").label]);
        }
        return shown;
    """)
    assert shown == [["mine", "trained on"], ["mine", "trained on"], ["base", "trained on"]]


def test_a_report_is_as_high_as_its_text_within_limits():
    assert run("""
        const heights = [];
        for (const scrollHeight of [20, 240, 900]) {
          node.onExecuted({ text: ["done"], page: [] });
          Object.assign(node.find("shown report").element, { scrollHeight });
          node.onExecuted({ text: ["done"], page: [] });
          heights.push(node.find("shown report").options.getMinHeight());
        }
        return [heights, node.find("shown report").element.style.fontSize];
    """) == [[140, 240, 320], "12px"]


def test_a_model_that_was_chosen_while_the_header_was_read_stays():
    assert (
        run("""
        answers.a = "base";
        const asked = choose("lora", "a");
        await choose("trained_on", "mine");
        await asked;
        return node.find("trained_on").value;
    """)
        == "mine"
    )


def test_fields_of_several_lines_and_buttons_say_what_they_are():
    field, *buttons = run("""
        node.onExecuted({ text: ["done"], page: ["a.html"] });
        return [node.find("prompt").element.title, node.find("settings").tooltip,
                node.find("open the whole report").tooltip];
    """)
    assert field == "What to draw." and all(text.endswith(".") for text in buttons)


def test_settings_that_few_need_are_shown_on_request():
    assert run("""
        const hidden = [node.find("method").hidden];
        node.find("settings").callback();
        hidden.push(node.find("method").hidden);
        return [hidden, node.find("lora").label, node.find("settings").serialize];
    """) == [[True, False], "LoRA", False]
