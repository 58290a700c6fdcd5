"""Makes the C library that Wine lacks a part of: the complex functions that NumPy imports.

    python ucrtbase.py FOLDER

Writes ucrtbase.dll, which has them and passes all others on to Wine's own, and that library as
ucrtwine.dll. Needs mingw's compiler.
"""

import re
import subprocess
import sys
from pathlib import Path

WINE = Path("/usr/lib/x86_64-linux-gnu/wine/x86_64-windows/ucrtbase.dll")
KINDS = {"": "double", "l": "double", "f": "float"}  # a long double is a double there
NAMES = "abs arg cos cosh exp log pow sin sinh sqrt tan tanh".split()
PARTS = {"real": "x.r", "imag": "x.i"}
START = """#include <complex.h>
#define KIND(T, name, f)                                                      \\
  typedef struct { T r, i; } name;                                            \\
  static T complex read_##name(name x) { return x.r + x.i * (T complex)I; }   \\
  static name write_##name(T complex z) { return (name){creal##f(z), cimag##f(z)}; }
KIND(double, D, )
KIND(float, F, f)
"""


def write_function(name: str, kind: str) -> str:
    """Writes one function for Windows, by mingw's own."""
    struct, last = ("F", "f") if kind == "f" else ("D", "")
    number, call = KINDS[kind], f"c{name}{last}"
    if name in PARTS:
        return f"{number} my_c{name}{kind}({struct} x) {{ return {PARTS[name]}; }}"
    if name in ("abs", "arg"):
        return f"{number} my_c{name}{kind}({struct} x) {{ return {call}(read_{struct}(x)); }}"
    second, more = (f", {struct} y", f", read_{struct}(y)") if name == "pow" else ("", "")
    value = f"write_{struct}({call}(read_{struct}(x){more}))"
    return f"{struct} my_c{name}{kind}({struct} x{second}) {{ return {value}; }}"


def main(folder: Path) -> None:
    """Compiles both libraries."""
    # Without its mark, Wine takes the library for one of Windows.
    library = WINE.read_bytes().replace(b"Wine builtin DLL", bytes(16), 1)
    (folder / "ucrtwine.dll").write_bytes(library)
    dump = ["x86_64-w64-mingw32-objdump", "-p", str(folder / "ucrtwine.dll")]
    listed = subprocess.check_output(dump, text=True).partition("[Ordinal/Name Pointer]")[2]
    theirs = set(re.findall(r"\[ *\d+\].* (\S+)$", listed, re.MULTILINE))
    ours = {f"c{name}{kind}": (name, kind) for name in [*NAMES, *PARTS] for kind in KINDS}
    exports = [f"{name} = my_{name}" for name in ours]
    exports += [f'"{name}" = "ucrtwine.{name}"' for name in sorted(theirs - ours.keys())]
    code, names = folder / "ucrtbase.c", folder / "ucrtbase.def"
    code.write_text(START + "\n".join(write_function(*what) for what in ours.values()))
    names.write_text("LIBRARY ucrtbase.dll\nEXPORTS\n" + "\n".join(exports))
    compiler = ["x86_64-w64-mingw32-gcc", "-O2", "-shared", "-static-libgcc"]
    subprocess.run([*compiler, "-o", str(folder / "ucrtbase.dll"), code, names], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
