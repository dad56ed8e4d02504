#!/usr/bin/env bash
# Everything worth knowing from one visit to a machine with a GPU, in at most nine minutes and without a network.
#
#   benchmarks/gpu.sh [PART...]          all parts, or the named ones
#
# Parts: build, gpu_tests (the rule of the Triton and CUDA kernels on the GPU), memcheck and racecheck (compute-sanitizer
# on a few cases of both), bench (`ofakern bench --device cuda`), cpu_tests (the op tests without a GPU, under whatever
# torch is there).
# A part that fails or runs out of time is named in the table at the end; the others run all the same.
#
# OUT      folder of the results, at most 8 files: a log per part, bench.json, report.txt (default: build/gpu)
# PYTHON   its environment gets ofakern, editable; it must hold torch, pybind11, cmake, ninja, scikit-build-core,
#          pytest and hypothesis (default: python3)
# SECONDS_ALLOWED   for all of it (default: 515)
#
# Exit code: 0 when every part passed, 1 when one did not, 2 when only the GPU was missing.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
ALLOWED=${SECONDS_ALLOWED:-515}
KNOWN="build gpu_tests memcheck racecheck bench cpu_tests"
read -r -a wanted <<<"${*:-$KNOWN}"
for part in "${wanted[@]}"; do
  case " $KNOWN " in
    *" $part "*) ;;
    *) echo "gpu.sh: a part must be one of $KNOWN, got $part" >&2; exit 1 ;;
  esac
done

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SECONDS=0
BYTES_KEPT=8000000
WORKERS=$(( $(nproc) / 2 > 0 ? $(nproc) / 2 : 1 ))
CASES="ofa_base_enc_1024_b32 plain_1024_b32 64mb 64mb_dropout head_scale_22k embed_8192 n4096_v59457"
CASES="$CASES u8_480_p16_d768_b128 30s_b64 motion_batch"
CASES="$CASES cross_b32_beam5_s1024 cross_b4_beam5_s1024 self_b32_beam5_t16 self_b4_beam5_t128 r160_v59457 r160_closed"
export PYTHONUNBUFFERED=1
declare -A state took note

# run PART LIMIT COMMAND...: into $OUT/PART.log, at most LIMIT seconds and never beyond what is left of all.
run() {
  local part=$1 limit=$2 left=$((ALLOWED - SECONDS)) start=$SECONDS code
  shift 2
  if ((left < 10)); then
    state[$part]="not run" took[$part]=0 note[$part]="no time was left"
    return
  fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$OUT/$part.log" 2>&1
  code=$?
  took[$part]=$((SECONDS - start))
  note[$part]=$(grep -v '^[[:space:]]*$' "$OUT/$part.log" | tail -n 1 | cut -c 1-90)
  case $code in
    0) state[$part]=ok ;;
    124 | 137) state[$part]="out of time" ;;
    *) state[$part]="FAILED ($code)" ;;
  esac
  if (($(wc -c <"$OUT/$part.log") > BYTES_KEPT)); then
    tail -c "$BYTES_KEPT" "$OUT/$part.log" >"$OUT/cut" && mv "$OUT/cut" "$OUT/$part.log"
  fi
}

# no_gpu PART: true, and said in the table, where torch sees no GPU.
no_gpu() {
  [[ -z $gpu_missing ]] && return 1
  state[$1]="no GPU" took[$1]=0 note[$1]=$gpu_missing
}

describe() {
  echo "machine"
  date -u +%Y-%m-%dT%H:%M:%SZ
  uname -srm
  nproc
  "$PYTHON" --version
  "$PYTHON" -m ofakern info
  nvidia-smi
  nvcc --version
}

build() {
  run build 240 env CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" "$PYTHON" -m pip install --disable-pip-version-check \
    --no-build-isolation --no-deps -Ccmake.define.OFAKERN_CUDA_ARCHITECTURES=90a \
    -Ccmake.define.OFAKERN_CUDA_STRICT=OFF -e .
}

cpu_tests() {
  run cpu_tests 200 env CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" \
    --ignore-glob='*triton*' tests/ops tests/build/test_bindings.py tests/build/test_isa.py
}

gpu_tests() {
  no_gpu gpu_tests || run gpu_tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" \
    -k "not emulat" tests/cuda "${triton_cases[@]}"
}

# sanitize TOOL: the CUDA kernels' rule in one dtype, and Triton's smallest case with every feature. Torch's allocator
# would hide a step beyond a tensor.
sanitize() {
  no_gpu "$1" && return
  if ! command -v compute-sanitizer >/dev/null; then
    state[$1]="not run" took[$1]=0 note[$1]="compute-sanitizer is not installed"
    return
  fi
  run "$1" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider -p no:xdist \
    -k "(everything and float16) or (rule and gpu and float16)" tests/cuda "${triton_cases[@]}"
}

bench() {
  # shellcheck disable=SC2086  # a list of words
  no_gpu bench || run bench 150 "$PYTHON" -m ofakern bench all --device cuda --case $CASES --dtype bf16 \
    --json "$OUT/bench.json"
}

asked() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

asked build && build
gpu_missing=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else "torch sees no GPU here")' 2>/dev/null) ||
  gpu_missing="torch does not import"
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$WORKERS")
triton_cases=(tests/ops/triton*_cases.py)

asked gpu_tests && gpu_tests
for tool in memcheck racecheck; do
  asked "$tool" && sanitize "$tool"
done
asked bench && bench
asked cpu_tests && cpu_tests

# ---- the table ------------------------------------------------------------------------------------------------------
code=0
describe >"$OUT/report.txt" 2>&1
table() {
  printf '%-10s %-13s %5s  %s\n' part state s "last line"
  for part in "${wanted[@]}"; do
    printf '%-10s %-13s %5s  %s\n' "$part" "${state[$part]}" "${took[$part]}" "${note[$part]}"
  done
  echo "results: $OUT, ${SECONDS} s in all"
}
for part in "${wanted[@]}"; do
  [[ ${state[$part]} == ok ]] && continue
  if [[ ${state[$part]} == "no GPU" ]]; then
    ((code == 0)) && code=2
  else
    code=1
  fi
done
if [[ -f $OUT/bench.log ]]; then
  tail -n 60 "$OUT/bench.log"
fi
table | tee -a "$OUT/report.txt"
exit "$code"
