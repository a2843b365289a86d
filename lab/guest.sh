#!/bin/bash
# Runs inside the lab's guest as its only job, started by lab/boot.py through virtme-ng.
# $1: the folder "result" of this run in the guest, shared with the host, read-write.
# Reads from it: job (shell variables). Writes: output (what pytest says, followed by the host),
# junit.xml, and last of all status (pytest's exit status; its absence means that the guest died).
set -u
result=$1
. "$result/job" # PROJECT, KERNEL, MODULES, and the arrays FOLDERS, DISK and PYTEST

# Everything that is read often is mounted a second time with the page cache on. virtme-ng's own
# mount asks the host for each stat and each page, each time.
cached=/run/lab-cached
mkdir -p $cached
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000,access=any lab-root $cached
mount -t tmpfs tmpfs /tmp
for folder in "${FOLDERS[@]}"; do
	mount --bind "$cached$folder" "$folder"
done
# The project is a copy from the moment when the run began, so that it can be edited meanwhile (a file
# that changes under cache=loose is read as garbage). Where it lies may be the guest's own /tmp.
mkdir -p "$PROJECT"
mount -t tmpfs tmpfs "$PROJECT"
tar -C "$PROJECT" -xf "$result/project.tar"
mkdir "$PROJECT/.venv"
# And what Python opens at each start is on a disk (lab/disk.py): an opening over 9p is four questions.
for module in virtio_blk ext4; do
	modprobe -d "$cached${MODULES%/lib/modules/*}" $module
done
mkdir -p /run/lab-disk
mount -t ext4 -o ro /dev/vda /run/lab-disk
for folder in "${DISK[@]}"; do
	mount --bind "/run/lab-disk$folder" "$folder"
done
# /usr above hid virtme-ng's /lib/modules, and may have none of its own: the kernel's own calls of
# modprobe (a link type, a qdisc, an nft expression at first use) are led to the unpacked kernel's.
cat >/run/lab-modprobe <<EOF
#!/bin/sh
exec /sbin/modprobe -d "$cached${MODULES%/lib/modules/*}" "\$@"
EOF
chmod 755 /run/lab-modprobe
echo /run/lab-modprobe >/proc/sys/kernel/modprobe
# What tests may write to, as on a real machine: nothing of the host's.
for folder in /var/lib /var/cache; do
	mount -t tmpfs tmpfs $folder
done

mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
# There is no udev here to make the node whose first opening loads the module.
[ -c /dev/net/tun ] || { mkdir -p /dev/net && mknod /dev/net/tun c 10 200; }
mkdir -p /run/netns
ip link set lo up

export HOME=/root TMPDIR=/tmp LANG=C.UTF-8
export PORTWRIGHT_LAB_KERNEL=$KERNEL
export PATH=$PROJECT/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cd "$PROJECT" || exit 1
# Code that the kernel patches while another CPU runs it may trap under emulation and end the guest ("Oops: int3").
# So what tests would switch on and off all the time is held on: the time stamps that ping asks for, the hooks of clsact.
tc qdisc add dev lo clsact
held="import signal, socket; s = socket.socket(type=socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, 29, 1)"
python -c "$held; signal.pause()" & # 29 is SO_TIMESTAMP
python -m pytest "${PYTEST[@]}" >"$result/output" 2>&1 </dev/null
echo $? >"$result/status.new"
mv "$result/status.new" "$result/status"
