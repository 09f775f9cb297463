"""Time and memory of converting a checkpoint of granite-4.0-1b-speech's size, and whether it comes back bit for bit.

    python benchmarks/convert.py [--scale 1.0] [--directory DIR]

Writes a checkpoint of random bits in Hugging Face format (4.6 GB in bfloat16), converts it to Orbax and back, loads it,
each step in a process of its own, and prints one JSON object a step: seconds, peak resident memory, bytes on disk.
`--scale 0.25` keeps a quarter of the layers. DIR is made if need be and needs three times the checkpoint's size;
nothing is left in it. The exit status is 1 if the checkpoint does not come back bit for bit.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CONFIG = Path(__file__).parents[1] / "granite_jax/models/granite_speech/config.json"
BLOCK = 1 << 24


def write(directory: Path, scale: float) -> None:
    """Writes config.json and model.safetensors of random bfloat16 numbers between 2^-7 and 2."""
    from granite_jax.checkpoint.tree import expected_shapes
    from granite_jax.convert import mapping, safetensors_file
    from granite_jax.models.granite_speech.config import Config
    from granite_jax.models.granite_speech.family import FAMILY

    raw = json.loads(CONFIG.read_text())
    for section, key in (("encoder_config", "num_layers"), ("text_config", "num_hidden_layers")):
        raw[section][key] = max(2, round(raw[section][key] * scale))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    config = Config.from_dict(raw)
    tensors = [(name, shape) for name, shape, *_ in mapping.hf_tensors(FAMILY.tensors, expected_shapes(config))]
    size = 2 * sum(math.prod(shape) for _, shape in tensors)
    rng = np.random.default_rng(0)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(safetensors_file.make_header((name, np.dtype(ml_dtypes.bfloat16), shape) for name, shape in tensors))
        for start in range(0, size, BLOCK):
            bits = rng.integers(0, 1 << 16, min(BLOCK, size - start) // 2, dtype=np.uint16)
            file.write(((bits & 0x83FF) | 0x3C00).tobytes())


def run(step: str, source: Path, destination: Path) -> None:
    """One step, in this process: prints its result."""
    import jax

    from granite_jax.convert import convert
    from granite_jax.pretrained import open_checkpoint

    started = time.monotonic()
    if step == "load":
        params = open_checkpoint(source).load_params("bfloat16")
        result = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    else:
        report = convert(source, destination)
        result = {"tensors": report.tensors, "parameters": sum(report.parameters.values()), "bytes": report.bytes}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.monotonic() - started
    print(json.dumps({"step": step, "seconds": round(seconds, 1), "peak_resident_bytes": peak, **result}), flush=True)


def identical(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same names, dtypes, shapes and bits, the unused counters aside."""
    import contextlib

    from granite_jax.convert.safetensors_file import open_file

    with contextlib.ExitStack() as stack:
        before, after = open_file(first, stack), open_file(second, stack)
        counters = {name for name in after if name.endswith("num_batches_tracked")}
        headers = [{n: (x.dtype, x.shape) for n, x in file.items() if n not in counters} for file in (before, after)]
        bits = (tuple(file[n].read().view(np.uint16) for file in (before, after)) for n in before)
        return headers[0] == headers[1] and all(np.array_equal(a, b) for a, b in bits)


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--step", nargs=3, metavar=("STEP", "SRC", "DST"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run(options.step[0], Path(options.step[1]), Path(options.step[2]))
        return
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        hf, own, back = (Path(directory, name) for name in ("hf", "own", "back"))
        write(hf, options.scale)
        size = (hf / "model.safetensors").stat().st_size
        print(json.dumps({"step": "write", "bytes": size}), flush=True)
        for step, source, destination in (("import", hf, own), ("load", own, own), ("export", own, back)):
            subprocess.run([sys.executable, __file__, "--step", step, source, destination], check=True)
        files = [directory / "model.safetensors" for directory in (hf, back)]
        bit_exact = identical(*files)
    print(json.dumps({"step": "compare", "bit_exact": bit_exact}))
    sys.exit(not bit_exact)


if __name__ == "__main__":
    main()
