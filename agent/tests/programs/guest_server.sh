# Runs in a guest: starts a PostgreSQL server and a recording, and meanwhile clients that alternate between two functions.
# guest_server.sh POSTGRES HEAVY LIGHT CLIENTS CPU FREQUENCY STEP
#   POSTGRES    path of the server; its data, and the files that it needs of its share directory, are in /server.tgz
#   HEAVY LIGHT numbers of rows that the queries of the two functions count
#   CLIENTS     number of clients for each kind of socket
#   CPU         milliseconds of CPU time that each client's backend uses before the client ends
#   FREQUENCY   sampling frequency, Hz
#   STEP        seconds by which the wall clock is set forward and back again, once a second; 0: the clock is not set
# Prints the line of `flamestorm doctor`, the summary and the folded stacks, each after a line `--- NAME`.
set -eu
postgres=$1 heavy=$2 light=$3 clients=$4 cpu=$5 frequency=$6 step=$7
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
echo '--- doctor'
flamestorm doctor | grep 'database callers'
# The recording ends when the clients have done their work, not after a time: how much an emulated machine does in a
# second depends on what else the host does.
flamestorm record --frequency "$frequency" --caller-stacks 100000 --summary json --output out.pb.gz \
    >/tmp/summary 2>/tmp/recording &
recording=$!
until grep -q 'flamestorm: recording' /tmp/recording; do
    kill -0 $recording || { cat /tmp/recording >&2; exit 1; }
    sleep 1
done
# The clients start when the agent has made the unwind tables of what runs already, which takes an emulated CPU many
# seconds: the agent then uses less than a fifth of a CPU. Fields 14 and 15 are its CPU time, in hundredths of a second.
used=$(awk '{ print $14 + $15 }' /proc/$recording/stat)
tries=0
while [ $tries -lt 60 ]; do
    tries=$((tries + 1))
    before=$used
    sleep 1
    used=$(awk '{ print $14 + $15 }' /proc/$recording/stat)
    [ $((used - before)) -ge 20 ] || break
done
all=
while [ "$clients" -gt 0 ]; do
    /two_queries /tmp/.s.PGSQL.5432 simple "$heavy" "$light" "cpu:$cpu" by_unix >>/tmp/by_unix 2>&1 &
    all="$all $!"
    /two_queries 4:5432 prepared "$heavy" "$light" "cpu:$cpu" by_tcp >>/tmp/by_tcp 2>&1 &
    all="$all $!"
    clients=$((clients - 1))
done
[ "$step" = 0 ] || /set_clock "$step" &
for client in $all; do
    wait "$client" || { cat /tmp/by_unix /tmp/by_tcp >&2; exit 1; }
done
kill $recording
wait $recording || { cat /tmp/recording >&2; exit 1; }
echo '--- summary'
cat /tmp/summary
echo
for socket in by_unix by_tcp; do
    echo "--- $socket"
    flamestorm report out.pb.gz --filter application=$socket --output - || { cat /tmp/$socket /tmp/recording >&2; exit 1; }
done
