#!/bin/sh
# Makes the environment .venv when it is missing or out of date, and says what it does.
#
#   sh tools/env.sh run       what the explorer and the library need
#   sh tools/env.sh dev       the above, and notebooks and tests (`docs`: and the site)
#   sh tools/env.sh browser   looks for a browser for the tests of the page
set -eu
cd "$(dirname "$0")/.."
want=${1:-dev}

say() { printf 'essl_nb: %s\n' "$*"; }
stop() { printf 'essl_nb: %s\n' "$*" >&2; exit 1; }
root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }
apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null 2>&1; }

if [ "$want" = browser ]; then
    for name in "${ESSL_CHROMIUM:-chromium}" chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null 2>&1 && exit 0
    done
    if root; then
        say "installing Debian's chromium, which the tests of the page drive"
        { apt update; apt install -y --no-install-recommends chromium; } ||
            say "chromium could not be installed; the tests of the page will be skipped"
    else
        say "no browser here, so the tests of the page will be skipped; to have them: sudo apt-get install chromium, or set ESSL_CHROMIUM"
    fi
    exit 0
fi

# The stamp holds the place, the metadata and the pins: when one of them changes, pip runs again.
key=$({ pwd; cat settings.ini setup.py constraints.txt; } | cksum | tr ' ' -)
ready() { [ -x .venv/bin/python ] && [ "$(cat ".venv/essl-$1" 2>/dev/null)" = "$key" ]; }

case $want in
    run) ready run && exit 0; target=".[study,app]" ;;
    dev | docs) ready "$want" && exit 0; target=".[all,$want]" ;;
    *) stop "tools/env.sh knows run, dev, docs and browser, not '$want'." ;;
esac

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
bare=0
if ! { [ -x .venv/bin/python ] && fits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    bare=1
    python=
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if fits "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || stop "Python 3.10 or later is needed and ${PYTHON:-python3} is $(${PYTHON:-python3} --version 2>&1 || echo not here); install one, or name it: make PYTHON=/path/to/python3 …"
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        root || stop "this Python cannot make environments; on Debian or Ubuntu: sudo apt-get install python3-venv"
        say "installing Debian's python3-venv"
        { apt update; apt install -y python3-venv; } || stop "python3-venv could not be installed; try: apt-get install python3-venv"
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

# A terminal shows pip's own bars; a log gets one line for each step.
if [ -t 1 ]; then quiet=; else quiet=-q; fi
pip() { PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check install --no-compile $quiet -c constraints.txt "$@"; }
began=$(date +%s)
if [ "$bare" = 1 ]; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 9 ] || say "only $free GB are free here; about 7 are needed on Linux (torch with CUDA is 5.4 of them)"
    say "installing torch and torchaudio: on Linux about 5.4 GB with the CUDA libraries, which also run on a CPU; minutes, once"
    pip torch torchaudio || stop "pip could not install torch; see its message above, then run the same command again: what was fetched is kept"
fi
say "installing essl_nb from this folder with ${want} requirements (under 1 GB)"
pip -e "$target" || stop "pip could not install the requirements; see its message above, then run the same command again"
echo "$key" >".venv/essl-$want"
[ "$want" = run ] || echo "$key" >.venv/essl-run
say "environment ready after $(($(date +%s) - began)) s"
