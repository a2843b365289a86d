#!/bin/sh
# PID 1 of a guest made by portwright.vmm.initramfs. What it does is on the kernel's command line, see cmdline.py:
#   portwright.nic=IFNAME,MAC,MTU
#   portwright.addr=IFNAME,ADDRESS/PREFIX
#   portwright.route=IFNAME,DST[,via=GATEWAY][,mtu=N][,advmss=N][,metric=N][,table=N][,scope=N]
#   portwright.httpd=PORT      serve /www
#   portwright.watch=IFNAME    say on the console when its carrier comes and goes
#   portwright.host=NAME
#   root=DEVICE                go on from /sbin/init there: the kernel's word
# It says "portwright: ready" on the console when all of that is done.

export PATH=/bin HOME=/root TERM=linux
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
dmesg -n 3 # the kernel's chatter: from here on the console is for people

say() { echo "portwright: $*"; }
load() { while read -r module; do insmod "/lib/$module" || say "$module did not load"; done <"/lib/$1"; }
load order
# Run a command; what it says is printed as ours, and the guest goes on.
try() { "$@" 2>/tmp/error || say "$* failed: $(cat /tmp/error)"; }
# The words of the command line that begin with portwright.$1=, without that.
words() { tr ' ' '\n' </proc/cmdline | sed -n "s/^portwright\.$1=//p"; }

ip link set dev lo up
ip addr add 127.0.0.1/8 dev lo 2>/dev/null
for word in $(words host); do hostname "$word"; done

# By its MAC, because the kernel numbers NICs as it finds them.
nic() {
	for path in /sys/class/net/*; do
		[ "$(cat "$path/address")" = "$2" ] || continue
		found=${path##*/}
		[ "$found" = "$1" ] || try ip link set dev "$found" name "$1"
		# As a container's: no router is believed, and an address serves at once.
		for key in accept_ra accept_dad autoconf; do echo 0 >"/proc/sys/net/ipv6/conf/$1/$key"; done
		try ip link set dev "$1" mtu "$3"
		try ip link set dev "$1" up
		say "$1 is $2, mtu $(cat "/sys/class/net/$1/mtu"), queues $(ls -d "/sys/class/net/$1/queues/rx-"* | wc -l)"
		return
	done
	say "no NIC has the MAC $2"
}
route() {
	dev=$1 dst=$2 args= onlink=
	shift 2
	for word; do
		case $word in via=*.*) onlink=onlink ;; esac
		args="$args ${word%%=*} ${word#*=}"
	done
	# shellcheck disable=SC2086 # words, not one
	try ip route add "$dst" dev "$dev" $args $onlink
}

# shellcheck disable=SC2046 # a word's parts are arguments
for word in $(words nic); do (IFS=,; nic $word); done
for word in $(words addr); do try ip addr add "${word#*,}" dev "${word%%,*}"; done
for word in $(words route); do (IFS=,; set -- $word; unset IFS; route "$@"); done

for word in $(words httpd); do
	[ -e /www/index.html ] || hostname >/www/index.html
	httpd -p "$word" -h /www
done

watch_carrier() {
	before=
	while :; do
		now=$(cat "/sys/class/net/$1/carrier")
		[ "$now" = "$before" ] || case $now in
		1) say "$1 has a carrier" ;;
		*) say "$1 has no carrier" ;;
		esac
		before=$now
		usleep 200000
	done
}
for word in $(words watch); do watch_carrier "$word" & done

# The kernel's own word: go on from that disk, in the network as it is now. The power button is then its affair.
for root in $(tr ' ' '\n' </proc/cmdline | sed -n 's/^root=//p'); do
	load order.disk
	try mount "$root" /mnt
	if [ -x /mnt/sbin/init ]; then
		mkdir -p /mnt/dev /mnt/proc /mnt/sys
		for folder in dev proc sys; do try mount -o move "/$folder" "/mnt/$folder"; done
		exec switch_root -c /dev/console /mnt /sbin/init
	fi
	say "$root has no /sbin/init"
done

# The power button: any event of any input device, of which this guest has no other.
for event in /dev/input/event*; do
	[ -e "$event" ] || continue
	(dd if="$event" of=/dev/null bs=24 count=1 2>/dev/null && say "power button" && sync && poweroff -f) &
done

say ready
setsid cttyhack sh -l
poweroff -f
