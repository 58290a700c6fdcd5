// Runs the package's own `check` on files whose bytes stay where they are: the file system below
// reads slices of them when Python asks, which are the header and the alphas.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const CHECK = `
import json, prolora
from prolora.errors import ProLoRAError, name_options

# Some whole models are named with torch alone, which no browser has.
BASE = ("This is a whole model that cannot be named here: \`prolora check FILE\` on your computer "
        "says which one it is.")

def spell(option, value):
    if value == "()":
        return f"\`prolora {option}\`"
    return f"--{'for' if option == 'format' else option} {value or ''}".strip()

def check(path, program, base=""):
    try:
        found = prolora.check(path, program=program or None, base=base or None)
    except ProLoRAError as error:
        said = str(error).removesuffix(error.command).rstrip().removeprefix(f"{path}: ")
        for one in filter(None, (path, base)):
            said = said.replace(one, one.rpartition("/")[2])
        return json.dumps({"mark": "✖", "headline": name_options(said, spell), "lines": []})
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return json.dumps({"mark": "✖", "headline": BASE, "lines": []})
    lines = [[name, name_options(text, spell)] for name, text in found.facts()]
    return json.dumps({"mark": found.mark, "headline": name_options(found.headline, spell),
                       "lines": lines, "json": found.to_dict()})

def list_programs():
    from prolora.architectures.loaders import known_loaders
    return json.dumps([[id_, loader.title] for id_, loader in known_loaders().items()])
`;

async function start() {
  const python = await loadPyodide();
  const package_ = await fetch("prolora.zip");
  if (!package_.ok) throw new Error("prolora.zip is missing beside this page");
  python.unpackArchive(await package_.arrayBuffer(), "zip");
  python.runPython(CHECK);
  postMessage({ programs: JSON.parse(python.runPython("list_programs()")) });
  return python;
}

const ready = start();
ready.catch((error) => postMessage({ failed: String(error) }));

onmessage = async ({ data: { id, file, program, model } }) => {
  const python = await ready;
  const fs = python.FS;
  const mount = (folder, one) => {
    if (!one) return "";
    fs.mkdirTree(folder);
    fs.mount(fs.filesystems.WORKERFS, { files: [one] }, folder);
    return `${folder}/${one.name}`;
  };
  try {
    const paths = [mount("/in/lora", file), mount("/in/model", model)];
    const check = python.globals.get("check");
    postMessage({ id, found: JSON.parse(check(paths[0], program, paths[1])) });
  } catch (error) {
    console.warn(error);
    const what = "This file could not be read here, by a fault of this page: please report it.";
    postMessage({ id, failed: what });
  } finally {
    fs.unmount("/in/lora");
    if (model) fs.unmount("/in/model");
  }
};
