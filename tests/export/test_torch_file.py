"""A .pt2 file gives the same logits in a process that cannot import moa-train."""

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["moa_train"] = None
import base64, io, json
import numpy as np, torch
from PIL import Image
extra = {"moa-train.json": ""}
model = torch.export.load(sys.argv[2], extra_files=extra).module()
record = json.loads(extra["moa-train.json"])
vectors = record["test_vectors"]
images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(vector["png"])))) for vector in vectors]
expected = torch.tensor([vector["logits"] for vector in vectors])
for batch in (1, 3):
    print(float((model(torch.from_numpy(np.stack(images[:batch]))) - expected[:batch]).abs().max()))
print(json.dumps(record["classes"]))
"""


def test_the_file_runs_without_moa_train(exported, logged):
    path, report = exported("torch_export")
    assert report["agreement"]["top1_count"] == logged["top1_count"]
    site = str(
        Path(find_spec("torch").origin).parents[1]
    )  # -S: no .pth file is read, so that an editable install stays invisible
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE, site, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *differences, classes = done.stdout.splitlines()
    assert max(map(float, differences)) < 1e-5
    assert json.loads(classes) == [str(digit) for digit in range(10)]


def test_the_file_contains_no_paths_of_this_machine(exported):
    with zipfile.ZipFile(exported("torch_export")[0]) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("json"))
    assert b"/moa_train/" not in content
    assert b"site-packages" not in content
