"""Pack folders for a machine that trains but does not search: datastores travel without their keys and index.

    python benchmarks/gpu/pack.py demo_output/retrofit demo_output/smollm2 -o pack.tar.xz
    tar xJf pack.tar.xz          # there, in the repository

Training on neighbors found beforehand, and measuring with them, read a datastore's tokens only. Of keys and index the
archive holds the first bytes and then empty space, which packs to nothing: the datastore opens, `verify` fails, and a
search finds nonsense. Weights (`model*.safetensors`) and what begins with a dot stay behind.
"""

import argparse
import os
import tarfile
import tempfile
from pathlib import Path

from retro_hf.datastore.manifest import MANIFEST_NAME


HEAD = 4096  # bytes of a file that say what it holds


def is_packed(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts) and not (
        path.name.startswith("model") and path.suffix == ".safetensors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .tar.xz")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(args.output, "w:xz") as archive:
        for folder in args.folders:
            for path in sorted(folder.rglob("*")):
                if not path.is_file() or not is_packed(path.relative_to(folder)):
                    continue
                is_store = (path.parent / MANIFEST_NAME).exists()
                if is_store and path.name.startswith(("keys", "index")):
                    empty = Path(scratch) / "empty"
                    with path.open("rb") as file:
                        empty.write_bytes(file.read(HEAD))
                    os.truncate(empty, path.stat().st_size)
                    archive.add(empty, path)
                    empty.unlink()
                else:
                    archive.add(path)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
