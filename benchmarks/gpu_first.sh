#!/bin/bash
# The first half hour on a card, unattended: benchmarks/gpu_first.sh OUT [PIECE...]
# Every piece takes at most nine minutes and leaves its figures in OUT; without names all run, in this order. OUT/pieces.jsonl
# has a line per piece: name, exit code (124: out of time), seconds. A piece that fails does not stop the next one.
# To rehearse without a card: LARGE=infinity-tiny LARGER=infinity-tiny ENGINES=eager,compiled ROUNDS=2 benchmarks/gpu_first.sh OUT
set -u
out=${1:?usage: benchmarks/gpu_first.sh OUT [PIECE...]}
shift
python=${PYTHON:-python}
large=${LARGE:-infinity-2b}
larger=${LARGER:-infinity-8b}
engines=${ENGINES:-eager,compiled,graph,graph-compiled,graph-kernels}
rounds=${ROUNDS:-10}
fastest=${engines##*,}
mkdir -p "$out"

bench() { # name, model, further options
    local name=$1 model=$2
    shift 2
    $python -m benchmarks.engine --model "$model" --rounds "$rounds" --output "$out/$name.json" "$@"
}

doctor() { $python -m tuner.cli doctor --model "$large" --weights random; }
tests() { $python -m pytest -q -x tests/stagevar/engine/test_graph.py tests/stagevar/models/test_fused.py tests/stagevar/engine/test_kernels.py tests/stagevar/tensors/test_cache.py tests/stagevar/models/test_precision.py; }
equal() {
    bench nano nano --check --engines "$engines" --schedules exact,stagevar-paper,stagevar-released,fastvar &&
        bench tiny infinity-tiny --weights random --check --engines "$engines" --schedules exact,stagevar-paper,fastvar
}
large() { bench large "$large" --weights random --check --engines "$engines" --schedules exact,stagevar-paper; }
larger() { bench larger "$larger" --weights random --engines "eager,$fastest" --schedules exact,stagevar-paper; }
cudnn() { bench cudnn "$large" --weights random --attention cudnn --engines "$fastest" --schedules exact,stagevar-paper; }
eight() { bench eight "$large" --weights random --engines "$fastest" --schedules exact,exact+fp8,exact+int8; }
others() { bench others "$large" --weights random --engines "$fastest" --schedules exact,stagevar-released,fastvar,focusvar; }
batches() { bench batches "$large" --weights random --engines "$fastest" --schedules exact,stagevar-paper --batches 1,2,4,8; }

export -f bench doctor tests equal large larger cudnn eight others batches
export out python large larger engines rounds fastest
for piece in ${@:-doctor equal large larger tests cudnn eight others batches}; do
    echo "== $piece"
    began=$SECONDS
    timeout 540 bash -c "$piece" 2>&1 | tee "$out/$piece.log"
    code=${PIPESTATUS[0]}
    echo "{\"piece\": \"$piece\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}" >>"$out/pieces.jsonl"
done
! grep -qv '"exit_code": 0' "$out/pieces.jsonl"
