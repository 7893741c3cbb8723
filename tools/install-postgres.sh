#!/bin/sh
# Installs Debian's PostgreSQL for the tests of that state store, where it is missing and this
# user may install packages; otherwise those tests are skipped. No cluster is made or started.
set -eu

for initdb in /usr/lib/postgresql/*/bin/initdb "$(command -v initdb || true)"; do
    [ -x "$initdb" ] && exit 0
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "PostgreSQL is not installed: its tests will be skipped" >&2
    exit 0
fi
echo "installing PostgreSQL for the tests ..."
export DEBIAN_FRONTEND=noninteractive
get="apt-get -qq -o DPkg::Lock::Timeout=120"
{
    $get update &&
        $get install -y --no-install-recommends postgresql-common &&
        sed -i 's/^#*create_main_cluster .*/create_main_cluster = false/' \
            /etc/postgresql-common/createcluster.conf &&
        $get install -y --no-install-recommends postgresql
} </dev/null >/dev/null || {
    echo "PostgreSQL cannot be installed: its tests will be skipped" >&2
    exit 0
}
