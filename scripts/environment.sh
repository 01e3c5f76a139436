# Sourced by demo.sh and test.sh: the virtual environment with the requirements of the files named in "$@".
# The one that is active, or else .venv. What is finished is marked by a file, so the same command recovers from any
# interruption, and nothing is asked of pip where nothing is to be done.
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -f .venv/.made ] && ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        echo "creating .venv" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
        python3 -m venv --clear .venv
        touch .venv/.made
    fi
    VIRTUAL_ENV=$PWD/.venv
fi
export VIRTUAL_ENV
export PATH="$VIRTUAL_ENV/bin:$PATH"
for file in "$@"; do
    stamp=$VIRTUAL_ENV/.installed-$(echo "$PWD/$file" | cksum | cut -d' ' -f1)
    if ! cmp -s "$file" "$stamp"; then
        echo "installing $file" >&2
        "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file" >&2
        cp "$file" "$stamp"
    fi
done
