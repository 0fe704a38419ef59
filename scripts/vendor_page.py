"""Fetches the libraries of the server's chat page from the npm registry, by the `npm` command.

Usage: python scripts/vendor_page.py [--check]

Each file is taken from a package of one version and must have the checksum stated below; `--check`
fetches nothing and compares the files that are here. For a new version: change it, run, review the
files, state the new checksums, which an error names. The files are as published, except that
stylesheets lose their fonts, which the page's policy forbids.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).parent.parent / "qwen3_mlx" / "server" / "page" / "vendor"
FONT = re.compile(rb"@font-face \{.*?\}\n+", re.DOTALL)
# Package and version, its licence, and its files: path in the package, name here, SHA-256.
PACKAGES = {
    ("markdown-it", "15.0.3", "MIT"): [
        (
            "dist/browser/markdown-it.umd.min.js",
            "markdown-it.js",
            "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e",
        ),
        (
            "LICENSE",
            "markdown-it.LICENSE.txt",
            "792c48c5a849a15fdf9e37e8bcf9e6d1dd13b32b46c642a748a0a46a9919d473",
        ),
    ],
    ("dompurify", "3.5.0", "Apache-2.0 or MPL-2.0"): [
        (
            "dist/purify.min.js",
            "purify.js",
            "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
        ),
        (
            "LICENSE",
            "purify.LICENSE.txt",
            "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
        ),
    ],
    ("temml", "0.13.5", "MIT"): [
        (
            "dist/temml.min.js",
            "temml.js",
            "1ab19148afe0dbc836b7a74f344071b3f3a70a7a8259ae4049e76894fcdf8d95",
        ),
        (
            "dist/Temml-Local.css",
            "temml.css",
            "10c8d3537cda6bb02d57536486401bfb3a1f4579a42d2f66ced9b10b8db9ae39",
        ),
        (
            "LICENSE",
            "temml.LICENSE.txt",
            "12b4e5592a12baaf50637881f2cb9d66667b26b8d51a73cd8f0d6bcefe176ab6",
        ),
    ],
    ("@highlightjs/cdn-assets", "11.12.0", "BSD-3-Clause"): [
        (
            "es/highlight.min.js",
            "highlight.js",
            "1ed8fc5256b738b8875b74e4d3f0754f60d6411fb034d618dfbc4e6e6c9999d7",
        ),
        (
            "LICENSE",
            "highlight.LICENSE.txt",
            "6c081431591d9df696c82dc598fe1423765b8a299b200ed00b281afd0f64c490",
        ),
    ],
    ("pdfjs-dist", "6.5.438", "Apache-2.0"): [
        (
            "legacy/build/pdf.min.mjs",
            "pdf.js",
            "522ad2c83bc8a0010e7f0cc60d0892b77c8d2bf2c9702dc12288311d94270f42",
        ),
        (
            "legacy/build/pdf.worker.min.mjs",
            "pdf.worker.js",
            "b4c8353ded0d88d2e2009574a29eb4e0c3ff7e942ecdf51ef5f71566a9667f31",
        ),
        (
            "LICENSE",
            "pdf.LICENSE.txt",
            "0d542e0c8804e39aa7f37eb00da5a762149dc682d7829451287e11b938e94594",
        ),
    ],
}


def main() -> None:
    """Fetch the files, or check those that are here."""
    if sys.argv[1:] != ["--check"]:
        FOLDER.mkdir(exist_ok=True)
        for (name, version, _), wanted in PACKAGES.items():
            fetch(f"{name}@{version}", wanted)
    if problems := check():
        sys.exit("\n".join(problems))
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{size:,} bytes in {FOLDER}")


def fetch(package: str, wanted: list[tuple[str, str, str]]) -> None:
    """Write the wanted files of a package to the folder."""
    with TemporaryDirectory() as place:
        command = ["npm", "pack", "--silent", "--pack-destination", place, package]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(place).iterdir()
        with tarfile.open(archive) as packed:
            for path, name, _ in wanted:
                content = packed.extractfile(f"package/{path}")
                assert content, path
                data = content.read()
                (FOLDER / name).write_bytes(FONT.sub(b"", data) if name.endswith(".css") else data)


def check() -> list[str]:
    """Return a line for each file that is missing, changed, or not listed."""
    stated = {name: digest for files in PACKAGES.values() for _, name, digest in files}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.iterdir()}
    return [
        f"{name}: {found.get(name, 'missing')}, not {stated.get(name, 'listed')}"
        for name in sorted(stated | found)
        if stated.get(name) != found.get(name)
    ]


if __name__ == "__main__":
    main()
