set -x
export OUT=${OUT:-/tmp/out} PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
export PYTHONPATH=/tmp/site
python3 -m pip install -q --no-index --no-deps --no-build-isolation -e . 2>&1 | tail -3 || true
python3 scripts/gpu.py --parts tests numerics digits exact faults warm_up attention step compiled layers cifar copies --budget ${1:-215} --out $OUT
