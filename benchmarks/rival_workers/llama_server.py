"""llama.cpp's own server, from a package that brings it built: it converts the model, then serves until killed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import xllamacpp
from gguf_file import write
from safetensors.numpy import load_file


def main(model: str, disk: str, port: str) -> None:
    """Serve on a port of this machine, with slots that can be saved to the folder ``disk``."""
    file = Path(model, "model.gguf")
    if not file.exists():
        write(Path(model), file, load_file(str(Path(model, "model.safetensors"))))
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.hostnames = ["127.0.0.1"]
    settings.port = int(port)
    settings.n_parallel, settings.n_ctx = 8, 8 * 8192
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
    settings.slot_save_path = f"{disk}/"
    settings.endpoint_slots = True
    server = xllamacpp.Server(settings)
    print(server.listening_address, file=sys.stderr)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
