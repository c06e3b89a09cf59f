#!/usr/bin/env bash
# Runs one command under another kernel, in qemu, and hands on its output and exit status.
#
#   scripts/qemu.sh [OPTION]… KERNEL -- COMMAND [ARGS]…
#   scripts/qemu.sh --fetch KERNEL            only fetch the kernel; prints the path of its image
#
# KERNEL is `6.1` or `6.12` (the newest of Debian's cloud kernels of that line, fetched by apt once
# and kept under target/kernels/), or the path of any bzImage with a serial console.
#
# The guest is an initramfs: busybox, COMMAND with the shared libraries it needs, and nothing else.
#   --file SOURCE[:TARGET]   also put this file (with its libraries) there; may be repeated
#   --memory MIB             guest memory, 512
#   --cpus N                 2
#   --append PARAMETERS      also give these parameters to the kernel, for example "preempt=full"
#   --seconds N              give up after this long (exit status 124), 120
#   --console                also show the kernel's console, on standard error
#
# Standard output, standard error and the exit status of COMMAND come out as if it had run here,
# when the guest has powered off. A guest that dies shows its console and exits with 125.
# COMMAND runs as root in /tmp, with /proc, /sys, /dev and a tmpfs on /tmp mounted. For a shell:
#
#   scripts/qemu.sh --file target/debug/flamestorm:/bin/flamestorm 6.1 -- \
#       sh -c 'flamestorm record --duration 3s --output - >out; echo $?; wc -l out'
#
# Needs qemu-system-x86, busybox-static, and apt with Debian's sources for the kernels. No root.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
kernels=${FLAMESTORM_KERNELS:-$here/target/kernels}
usage() {
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}
die() {
    echo "qemu.sh: $*" >&2
    exit 125
}

# Newest package of a line: prints its name, fetching nothing.
newest_package() {
    local pattern
    case $1 in
    6.1) pattern='^linux-image-6\.1\.[0-9.-]+-cloud-amd64-unsigned$' ;;
    6.12) pattern='^linux-image-6\.12\.[0-9.]+\+deb12(-[0-9]+)?-cloud-amd64-unsigned$' ;;
    *) die "no such kernel: $1 (6.1, 6.12 or the path of an image)" ;;
    esac
    apt-cache search --names-only "$pattern" | cut -d' ' -f1 | sort -V | tail -n 1
}

# Path of the kernel image for 6.1 or 6.12; an image that is already there is not looked for again.
kernel_image() {
    local line=$1 directory=$kernels/$1 package
    if ! ls "$directory"/vmlinuz-* >/dev/null 2>&1; then
        package=$(newest_package "$line")
        [ -n "$package" ] || die "apt knows no cloud kernel $line (is Debian's security archive among its sources?)"
        echo "qemu.sh: fetching $package" >&2
        mkdir -p "$kernels"
        local fetching
        fetching=$(mktemp -d "$kernels/fetching.XXXXXX")
        (
            cd "$fetching"
            apt-get download -q "$package" >&2 || die "cannot download $package"
            dpkg -x ./*.deb tree
            mkdir -p "$directory"
            # Renamed into place, so that two at a time do not see half a kernel.
            mv tree/boot/vmlinuz-* "$directory"/
        )
        rm -rf "$fetching"
    fi
    ls "$directory"/vmlinuz-* | sort -V | tail -n 1
}

# Puts an executable or a plain file into the root directory being built, with its libraries.
add_file() {
    local source=$1 target=$2 library
    [ -e "$source" ] || die "no such file: $source"
    mkdir -p "$root/$(dirname "$target")"
    cp -L "$source" "$root/$target"
    for library in $(ldd "$source" 2>/dev/null | grep -o '/[^ ]*'); do
        if [ -e "$library" ] && [ ! -e "$root/$library" ]; then
            mkdir -p "$root/$(dirname "$library")"
            cp -L "$library" "$root/$library"
        fi
    done
}

memory=512 cpus=2 append= seconds=120 console=no fetch=no
files=()
while [ $# -gt 0 ]; do
    case $1 in
    --file) files+=("$2"); shift 2 ;;
    --memory) memory=$2; shift 2 ;;
    --cpus) cpus=$2; shift 2 ;;
    --append) append+=" $2"; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --console) console=yes; shift ;;
    --fetch) fetch=yes; shift ;;
    -h | --help | --* | -?) usage ;;
    *) break ;;
    esac
done
[ $# -ge 1 ] || usage
kernel=$1
shift
if [ ! -f "$kernel" ]; then
    kernel=$(kernel_image "$kernel")
fi
if [ "$fetch" = yes ]; then
    echo "$kernel"
    exit
fi
[ "${1-}" = -- ] && [ $# -ge 2 ] || usage
shift
for tool in qemu-system-x86_64 busybox; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install --no-install-recommends qemu-system-x86 busybox-static"
done

work=$(mktemp -d "${TMPDIR:-/tmp}/flamestorm-qemu.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,proc,sys,dev,tmp,etc}
# Merged /usr, as on the host: a library is found by either name.
mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
for directory in sbin lib lib64; do ln -s "usr/$directory" "$root/$directory"; done
rmdir "$root/bin" && ln -s usr/bin "$root/bin"
busybox=$(command -v busybox)
! ldd "$busybox" >/dev/null 2>&1 || die "busybox is not static: apt-get install busybox-static"
add_file "$busybox" /bin/busybox
for file in "${files[@]}"; do
    source=${file%%:*} target=${file#*:}
    [ "$target" != "$file" ] || target=$(realpath "$source")
    add_file "$source" "$target"
done
# COMMAND: a path, or a name that busybox or a --file provides.
case $1 in
*/*) [ -e "$root/$1" ] || { [ -e "$1" ] && add_file "$1" "$(realpath "$1")" && set -- "$(realpath "$1")" "${@:2}"; } || die "no such command: $1" ;;
esac

echo 'root:x:0:0:root:/tmp:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/sh' >"$root/etc/passwd"
{
    for argument in "$@"; do printf "'%s' " "$(printf %s "$argument" | sed "s/'/'\\\\''/g")"; done
    echo
} >"$root/command"
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for port in 1 2 3; do stty -F /dev/ttyS$port raw -echo; done
cd /tmp
sh /command >/dev/ttyS1 2>/dev/ttyS2 </dev/null
echo $? >/dev/ttyS3
sync
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) | gzip -1 >"$work/initramfs"

touch "$work"/{console,stdout,stderr,status}
set +e
timeout "$seconds" qemu-system-x86_64 -accel tcg -m "$memory" -smp "$cpus" \
    -kernel "$kernel" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 8250.nr_uarts=4$append" \
    -display none -monitor none -no-reboot -nodefaults \
    -serial "file:$work/console" -serial "file:$work/stdout" \
    -serial "file:$work/stderr" -serial "file:$work/status" </dev/null
qemu=$?
set -e
cat "$work/stderr" >&2
cat "$work/stdout"
if [ "$console" = yes ]; then cat "$work/console" >&2; fi
status=$(tr -dc 0-9 <"$work/status")
if [ -z "$status" ]; then
    if [ "$console" = no ]; then tail -n 30 "$work/console" >&2; fi
    if [ "$qemu" = 124 ]; then
        echo "qemu.sh: $(basename "$kernel"): gave up after $seconds s" >&2
        exit 124
    fi
    die "$(basename "$kernel"): the guest died (qemu's exit status $qemu)"
fi
exit "$status"
