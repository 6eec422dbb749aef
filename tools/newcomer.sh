#!/usr/bin/env bash
# Does what a newcomer does, each way from an empty folder outside the repository, and says which ways work.
#
#   tools/newcomer.sh [--over VENV] [WAY...]
#
# Ways are the functions way_NAME below; without names all run that this machine can. Where cannot_NAME prints a
# reason, the way is skipped, or is a failure if it was named. A way runs in its own empty folder with $repo,
# $wheel_python and $over set; it prints what it does and fails with the first command that fails.
#
#   --over VENV   take the dependencies of another environment in place of installing them (minutes less)
#   PYTHONS       interpreters of the way `wheel`, such as "3.11 3.12 3.13" (default: that of --over, $PYTHON, or python3)
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel_python=${PYTHON:-$(command -v python3.11 || command -v python3)}
over=
ways=()
while [ $# -gt 0 ]; do
    case $1 in
        --over) over=$(cd "$2" && pwd); shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) ways+=("$1"); shift ;;
    esac
done
[ -z "$over" ] || wheel_python=$over/bin/python  # packages of one version of Python do not fit another
unset PYTHONPATH VIRTUAL_ENV
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { printf '%s\n' "-- $*"; }

# run COMMAND...: print it, run it.
run() {
    printf '%s\n' "\$ $*"
    "$@"
}

# start NAME LOG COMMAND...: print it, run it in the background; its number is in the variable NAME. The command takes the
# shell's place there: a signal to that number is a signal to it.
start() {
    local name=$1 log=$2
    shift 2
    printf '%s\n' "\$ $* &"
    (exec "$@") >"$log" 2>&1 &
    printf -v "$name" %s "$!"
}

# stop NUMBER: ask it to end, and wait until it has.
stop() {
    kill -TERM "$1" 2>/dev/null || true
    wait "$1" || true
}

# build_wheel: sdist and wheel into $scratch/dist, once, from a copy of what git knows or would add; checked.
build_wheel() {
    [ -d "$scratch/dist" ] && return
    local tools=$scratch/tools tree=$scratch/tree
    mkdir "$tree"
    (cd "$repo" && git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - 2>/dev/null) | tar -x -C "$tree"
    "$wheel_python" -m venv "$tools"
    [ -z "$over" ] || take_over "$tools"
    "$tools/bin/python" -m pip install -qq build twine check-wheel-contents 'setuptools>=77'  # as pyproject.toml asks
    "$tools/bin/python" -m build ${over:+--no-isolation} -o "$scratch/dist" "$tree" >"$scratch/build.log" 2>&1 || { tail -20 "$scratch/build.log"; return 1; }
    if grep -n "would be ignored" "$scratch/build.log"; then return 1; fi
    "$tools/bin/twine" check --strict "$scratch"/dist/*
    "$tools/bin/check-wheel-contents" --config "$repo/pyproject.toml" "$scratch"/dist/*.whl
}

# take_over FOLDER: let an environment find the packages of --over, behind its own.
take_over() {
    "$1/bin/python" -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "over.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
        "$("$over/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
}

# new_venv FOLDER PYTHON EXTRAS: an empty environment with the wheel in it.
new_venv() {
    local folder=$1 python=$2 extras=${3:-} wheel
    wheel=$(echo "$scratch"/dist/*.whl)
    if [ -n "$over" ]; then
        "$python" -m venv --without-pip "$folder"
        take_over "$folder"
        "$over/bin/python" -m pip --python "$folder/bin/python" install -qq --no-deps --force-reinstall "$wheel"
    else
        "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install -qq -c "$repo/constraints.txt" "$wheel$extras"
    fi
}

# python_named VERSION: its path, or nothing.
python_named() {
    uv python find "$1" 2>/dev/null || command -v "python$1" 2>/dev/null |
        while read -r each; do "$each" --version >/dev/null 2>&1 && echo "$each"; done || true
}

# -- ways ------------------------------------------------------------------------------------------

cannot_wheel() { :; }
way_wheel() {
    build_wheel
    local python version tried=0
    for version in ${PYTHONS:-$wheel_python}; do
        python=$version
        [ -x "$python" ] || python=$(python_named "$version")
        if [ -z "$python" ]; then
            say "Python $version: none on this machine and none to be had: not tried"
            continue
        fi
        say "$("$python" --version)"
        use_wheel "$python"
        tried=$((tried + 1))
        rm -rf env work
    done
    [ "$tried" -gt 0 ]
}

# use_wheel PYTHON: install, talk, make data, train a step.
use_wheel() {
    new_venv env "$1" '[synthetic]'
    local bin=$PWD/env/bin tiny=(--config trainer/tiny --config model/tiny --config data/tiny)
    mkdir work && cd work
    run "$bin/rest" --version
    run "$bin/python" -c 'import rest_lightning, pathlib, sys
assert pathlib.Path(rest_lightning.__file__).is_relative_to(sys.prefix), rest_lightning.__file__
from rest_lightning import TalkingHead'
    run "$bin/rest" doctor --seconds 1
    run "$bin/rest" demo
    local assets
    assets=$("$bin/python" -c 'import pathlib, rest_lightning; print(pathlib.Path(rest_lightning.__file__).parent / "assets")')
    run "$bin/rest" talk "$assets/people/portraits/ada.png" "$assets/speech.wav" -o out.mp4 --quiet
    test -s outputs/demo.mp4 -a -s outputs/demo.png -a -s out.mp4
    if ! "$bin/python" -c 'import skia, espeakng_loader' 2>/dev/null; then
        say "no skia or espeakng-loader for this Python: no synthetic talkers, training not tried"
    else
        run "$bin/rest" synthesize --out data/tiny --num_clips 4 --size_px 64 --num_frames 57 --val_fraction 0.25
        # The teacher starts from a VAE and a SpeechAE: a step of each first.
        run "$bin/rest" fit --config embedded/vae_decoder "${tiny[@]}" --model.init_args.initial null --trainer.fast_dev_run true
        run "$bin/rest" fit --config embedded/speech_ae "${tiny[@]}" --trainer.fast_dev_run true
        run "$bin/rest" fit --config embedded/teacher "${tiny[@]}" --trainer.fast_dev_run true
        test -s runs/embedded/teacher/final.ckpt
    fi
    cd ..
}

cannot_hub() { :; }
way_hub() {
    build_wheel
    new_venv env "$wheel_python"
    local bin=$PWD/env/bin assets talk url stop
    assets=$("$bin/python" -c 'import pathlib, rest_lightning; print(pathlib.Path(rest_lightning.__file__).parent / "assets")')
    talk=(talk "$assets/people/portraits/ada.png" "$assets/speech.wav" --quiet)
    # The hub itself cannot be asked from everywhere: a fake of its interface stands in, on this machine.
    exec {stop}> >(exec "$bin/python" "$repo/tests/helpers/fake_hub.py" >address)
    for _ in $(seq 100); do [ -s address ] && break; sleep 0.1; done
    url=$(cat address)
    export HF_ENDPOINT=$url HF_HOME=$PWD/hf HF_HUB_DISABLE_XET=1
    say "a hub at $url"
    run env HF_TOKEN=hf_good "$bin/python" -c 'from rest_lightning import TalkingHead
print(TalkingHead.from_pretrained().push_to_hub("me/head", license="apache-2.0"))'
    run "$bin/rest" "${talk[@]}" -o out.mp4 --model me/head
    exec {stop}>&-
    say "the hub is gone"
    run env HF_HUB_OFFLINE=1 "$bin/rest" "${talk[@]}" -o offline.mp4 --model me/head@main
    run "$bin/python" -c 'from rest_lightning.models import CompactVAE
print(type(CompactVAE.from_pretrained("me/head", subfolder="vae", local_files_only=True)).__name__)'
    cmp out.mp4 offline.mp4
    unset HF_ENDPOINT HF_HOME HF_HUB_DISABLE_XET
}

cannot_resolve() { command -v uv >/dev/null || echo "no uv on this machine: pip install uv"; }
# Every extra has versions that fit together, on each Python that we name. Nothing is installed.
way_resolve() {
    local version group
    for version in 3.11 3.12 3.13 3.14; do
        # mediapipe, of `prepare`, excludes what voice agents need: two groups.
        for group in "" "completion converse metrics prepare ray serve synthetic" "converse livekit pipecat"; do
            uv pip compile -q --python-version "$version" ${group:+$(printf -- '--extra %s ' $group)} -o resolved "$repo/pyproject.toml" >/dev/null
            say "Python $version [$group]: $(grep -c == resolved) packages, $(grep ^torch== resolved)"
        done
    done
}

# The steps of the Dockerfile without Docker: only what it copies, its command as a user without rights, its health check.
cannot_container() { command -v setpriv >/dev/null || echo "no setpriv on this machine (util-linux)"; }
way_container() {
    local file=$repo/Dockerfile port=18765 user=() each code
    mkdir src home
    for each in $(sed -n 's/^COPY \([^-].*\) [^ ]*$/\1/p' "$file"); do
        grep -qxF "!$each" "$repo/.dockerignore"  # else Docker does not see it
        cp -r "$repo/$each" src/
    done
    if [ -n "$over" ]; then
        "$wheel_python" -m venv --without-pip venv
        take_over venv
        # Built by what the environment has, not in one of its own.
        "$over/bin/python" -m pip --python venv/bin/python install -qq --no-deps --no-build-isolation ./src
    else
        "$wheel_python" -m venv venv
        (cd src && run ../venv/bin/python -m pip install -qq -c constraints.txt '.[serve]')
        run du -sm venv
    fi
    chmod -R a+rX . && chmod a+rwx home && chmod a+x "$scratch"
    each=$(sed -n 's/^USER //p' "$file")
    if [ "$(id -u)" -eq 0 ] && setpriv --reuid "$each" --regid "$each" --clear-groups env -i venv/bin/rest --version >/dev/null 2>&1; then
        user=(setpriv --reuid "$each" --regid "$each" --clear-groups)
    else
        say "this user cannot become user $each, or that one cannot read this Python: as user $(id -u)"
    fi
    local words
    words=$(sed -n 's/^CMD \[\(.*\)\]$/\1/p' "$file" | tr -d '",')
    cd home
    local server check
    start server log "${user[@]}" env -i PATH="$PWD/../venv/bin:/usr/bin:/bin" HOME="$PWD" ../venv/bin/rest $words --port "$port"
    check=$(sed -n 's/^ *CMD \["python", "-c", "\(.*\)"\]$/\1/p' "$file")
    code=1
    for _ in $(seq 120); do
        if ../venv/bin/python -c "${check//8765/$port}" 2>/dev/null; then code=0; break; fi
        kill -0 "$server" 2>/dev/null || break
        sleep 1
    done
    [ "$code" -eq 0 ] && say "healthy: rest $words" || cat log
    stop "$server"
    cd ..
    return "$code"
}

# The folder of the Space, started as a Space starts it, and a video of its first example.
cannot_app() { :; }
way_app() {
    build_wheel
    new_venv env "$wheel_python" '[app]'
    local bin=$PWD/env/bin port=17860 code=1
    cp -r "$repo/examples/space" space
    cd space
    local server
    start server ../log env GRADIO_SERVER_PORT="$port" "$bin/python" app.py
    for _ in $(seq 120); do grep -q '^open' ../log && break; sleep 1; done
    run "$bin/python" -c "
import pathlib, rest_lightning
from gradio_client import Client, handle_file
assets = pathlib.Path(rest_lightning.__file__).parent / 'assets'
client = Client('http://127.0.0.1:$port', verbose=False)
files = [handle_file(str(assets / name)) for name in ('people/portraits/ada.png', 'speech.wav')]
said = client.submit(*files, False, 0, api_name='/talk')
lines = [each[1] for each in said]
print(lines[-1])
assert lines[-1].startswith('367 of 367 frames'), lines" && code=0 || cat ../log
    stop "$server"
    cd ..
    return "$code"
}

# Every cell of the notebook but the one that installs, with the package from the wheel.
cannot_notebook() { :; }
way_notebook() {
    build_wheel
    new_venv env "$wheel_python" '[synthetic]'
    local pip=env/bin/python
    [ -z "$over" ] || pip=$over/bin/python
    "$pip" -m pip --python env/bin/python install -qq ipython
    mkdir work && cd work
    MPLBACKEND=agg run ../env/bin/python -c "
import json, sys
cells = [''.join(each['source']) for each in json.load(open(sys.argv[1]))['cells'] if each['cell_type'] == 'code']
space = {'__name__': '__main__'}
for cell in cells:
    if not cell.startswith('%pip'):
        exec(cell, space)
points = space['curves']['train/mse']
assert len(points) == space['NUM_STEPS'] and points[-1][1] < points[0][1], points
from rest_lightning.media.video import VideoFile
assert space['curves']['val/mse'] and len(space['frames']) == 75 and VideoFile('out.mp4').num_frames == 367" "$repo/examples/quickstart.ipynb"
    test -s out.mp4 -a -s sheet.png
    cd ..
}

# -- dispatch --------------------------------------------------------------------------------------

# main: the ways that were named, or all.
main() {
    known=$(declare -F | sed -n 's/^declare -f way_//p')
    named=${#ways[@]}
    [ "$named" -gt 0 ] || mapfile -t ways <<<"$known"
    passed=0 failed=0 skipped=0
    for way in "${ways[@]}"; do
        if ! declare -F "way_$way" >/dev/null; then
            echo "error: expected a way of $(echo $known), got $way" >&2
            exit 2
        fi
        reason=$("cannot_$way" 2>/dev/null || true)
        if [ -n "$reason" ]; then
            say "$way: not tried: $reason"
            if [ "$named" -gt 0 ]; then failed=$((failed + 1)); else skipped=$((skipped + 1)); fi
            continue
        fi
        say "$way"
        mkdir "$scratch/$way"
        set +e  # a way ends with the first command that fails, but not the others with it
        (set -e && cd "$scratch/$way" && "way_$way")
        code=$?
        set -e
        rm -rf "${scratch:?}/$way"
        if [ "$code" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
        say "$way: $([ "$code" -eq 0 ] && echo passed || echo "failed with code $code")"
    done
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
}

main
exit  # a file that is edited meanwhile is not read on
