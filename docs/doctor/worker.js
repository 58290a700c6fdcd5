// Runs the package's own `check` on files whose bytes stay where they are: the file system below
// reads slices of them when Python asks, which are the header and the alphas.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const CHECK = `
import json, prolora
from prolora.errors import ProLoRAError, name_options

def spell(option, value):
    if value == "()":
        return f"\`prolora {option}\`"
    return f"--{'for' if option == 'format' else option} {value or ''}".strip()

def check(path, program):
    try:
        found = prolora.check(path, program=program or None)
    except ProLoRAError as error:
        return json.dumps({"mark": "✖", "headline": str(error).removeprefix(f"{path}: "), "lines": []})
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

onmessage = async ({ data: { id, file, program } }) => {
  const python = await ready;
  const fs = python.FS, folder = `/in/${id}`;
  fs.mkdirTree(folder);
  fs.mount(fs.filesystems.WORKERFS, { files: [file] }, folder);
  try {
    const check = python.globals.get("check");
    postMessage({ id, found: JSON.parse(check(`${folder}/${file.name}`, program)) });
  } catch (error) {
    postMessage({ id, failed: String(error) });
  } finally {
    fs.unmount(folder);
  }
};
