"""Takes libtorch's CPU side out of wheels. Arguments: target folder, then wheel and sha256 (or '-') in turn."""

import hashlib
import os
import shutil
import sys
import zipfile

# The Python binding and everything that needs a GPU stay behind, whatever the platform names them.
SKIPPED = ("cuda", "nvrtc", "nvshmem", "nccl", "cudnn", "cublas", "torch_python", "libshm")
# libtorch_cpu.so of a CUDA build is linked against these two of CUDA's libraries and no other.
RUNTIME = ("libcudart.so", "libcupti.so")


def destination(name):
    """Where a member goes below the target folder, or None if it stays behind."""
    if name.endswith("/"):
        return None
    if name.startswith("torch/include/"):
        return name[len("torch/"):]
    base = os.path.basename(name)
    if ".so" not in base:
        return None
    if name.startswith("nvidia/"):
        return "lib/" + base if base.startswith(RUNTIME) else None
    if name.startswith("torch.libs/"):
        return "lib/" + base
    if name.startswith("torch/lib/") and name.count("/") == 2:
        skipped = base == "libtorch.so" or any(word in base for word in SKIPPED)
        return None if skipped else "lib/" + base
    return None


def check(path, expected):
    digest = hashlib.sha256()
    with open(path, "rb") as wheel:
        for chunk in iter(lambda: wheel.read(1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        sys.exit("%s has sha256 %s, but %s was expected" % (path, digest.hexdigest(), expected))


def unpack(path, target):
    count = 0
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.infolist():
            place = destination(member.filename)
            if place is None:
                continue
            place = os.path.join(target, place)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            # zipfile compares each member's CRC while reading.
            with wheel.open(member) as source, open(place, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if ".so" in os.path.basename(place):
                os.chmod(place, 0o755)
            count += 1
    if count == 0:
        sys.exit("%s holds nothing that libtorch needs" % path)


target, rest = sys.argv[1], sys.argv[2:]
for path, expected in zip(rest[0::2], rest[1::2]):
    if expected != "-":
        check(path, expected)
    unpack(path, target)
