#!/bin/sh
# Installs Debian's packages that some tests need, where they are missing and this user may install
# them: PostgreSQL for its state store, bubblewrap for the sandbox. Without them those tests are
# skipped, which is a failure where CI is set. No cluster is made or started.
set -eu

missing=
for initdb in /usr/lib/postgresql/*/bin/initdb "$(command -v initdb || true)"; do
    [ -x "$initdb" ] && found=yes
done
[ "${found:-}" ] || missing="$missing postgresql"
command -v bwrap >/dev/null || missing="$missing bubblewrap"
[ "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing; the tests that need them will be skipped" >&2
    exit 0
fi
echo "installing for the tests:$missing ..."
export DEBIAN_FRONTEND=noninteractive
install() { apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@"; }
{
    apt-get -qq -o DPkg::Lock::Timeout=120 update
    case $missing in *postgresql*)
        install postgresql-common
        sed -i 's/^#*create_main_cluster .*/create_main_cluster = false/' \
            /etc/postgresql-common/createcluster.conf
        ;;
    esac
    # shellcheck disable=SC2086 - a list of packages
    install $missing
} </dev/null >/dev/null || {
    echo "cannot be installed:$missing; the tests that need them will be skipped" >&2
    exit 0
}
