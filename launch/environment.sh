# Sourced by the other scripts here: makes a virtual environment once, and sets $python to it.
#   make_environment FOLDER EXTRAS     e.g. make_environment .venv ""   or   .venv-test "[test]"
# PYTHON chooses the interpreter (3.11 to 3.13); each version gets a folder of its own.

# Packages come with uv, which is several times faster, or with pip where uv is not to be had.
# torch (tests only) is left to pip alone: it knows of wheels that lie on a machine's own disk.
install_packages() {
  local extras=$1
  [ "$extras" != "[test]" ] || "$python" -m pip install -q "$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)"
  if "$python" -m pip install -q uv; then
    "$python" -m uv pip install -q --compile-bytecode --python "$python" -e ".$extras" && return
  fi
  "$python" -m pip install -q -e ".$extras"
}

make_environment() {
  local interpreter=${PYTHON:-python3} version folder
  version=$("$interpreter" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "error: $interpreter cannot be run; set PYTHON to a Python 3.11 to 3.13" >&2; exit 1; }
  case $version in
    3.11 | 3.12 | 3.13) ;;
    *) echo "error: Python $version is not supported; set PYTHON to a Python 3.11 to 3.13" >&2; exit 1 ;;
  esac
  folder=$1-$version
  python=$PWD/$folder/bin/python
  # The stamp is written last and holds what was installed: a broken or outdated one is made anew.
  local stamp=$folder/installed wanted
  wanted=$(cat setup.py | cksum)$2
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $folder (once; a minute or two)"
    rm -rf "$folder"
    "$interpreter" -m venv "$folder"
    install_packages "$2"
    echo "$wanted" >"$stamp"
  fi
}
