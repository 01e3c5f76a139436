# Sourced by demo.sh and test.sh: the virtual environment with the requirements of the files named in "$@".
# The one that is active, or else .venv; what is installed already is recognized by a stamp, without asking pip.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "creating .venv" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
        python3 -m venv .venv
    fi
    . .venv/bin/activate
fi
for file in "$@"; do
    stamp=$VIRTUAL_ENV/.installed-$(echo "$PWD/$file" | cksum | cut -d' ' -f1)
    if ! cmp -s "$file" "$stamp"; then
        echo "installing $file" >&2
        python -m pip install --quiet --disable-pip-version-check -r "$file" >&2
        cp "$file" "$stamp"
    fi
done
