# In a guest: a PostgreSQL, two clients that take turns with two functions each, and a recording of it.
# guest_server.sh POSTGRES     (its data, and what it needs of its share directory, are in /server.tgz)
# Prints the doctor's line, the summary and the folded stacks, each after a line `--- NAME`.
set -eu
postgres=$1
mkdir -p "${postgres%/bin/postgres}/lib"
(cd / && tar xzf /server.tgz)
chown -R nobody /tmp/data
chmod 777 /tmp
ifconfig lo 127.0.0.1 up
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
su nobody -s /bin/sh -c "$postgres -D /tmp/data -k /tmp -c port=5432 -c listen_addresses=127.0.0.1 \
    -c shared_buffers=16MB -c timezone=UTC -c log_timezone=UTC" >/tmp/log 2>&1 &
tries=0
until [ -S /tmp/.s.PGSQL.5432 ]; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || { cat /tmp/log >&2; exit 1; }
    sleep 1
done
sleep 2
/two_queries /tmp/.s.PGSQL.5432 simple 40000 10000 120 by_unix >/tmp/by_unix 2>&1 &
/two_queries 4:5432 prepared 40000 10000 120 by_tcp >/tmp/by_tcp 2>&1 &
# A program is learnt at its first samples, and these machines are slow.
sleep 3
echo '--- doctor'
flamestorm doctor | grep 'database callers'
echo '--- summary'
flamestorm record --frequency 199 --duration 10s --summary json --output out.pb.gz --output out.folded
echo
for socket in by_unix by_tcp; do
    echo "--- $socket"
    flamestorm report out.pb.gz --filter application=$socket --output - || { cat /tmp/$socket >&2; exit 1; }
done
