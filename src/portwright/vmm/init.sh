#!/bin/sh
# PID 1 of a guest made by portwright.vmm.initramfs. What it does is on the kernel's command line, see cmdline.py:
#   portwright.nic=IFNAME,MAC,MTU
#   portwright.addr=IFNAME,ADDRESS/PREFIX[,peer=A][,brd=A][,scope=N][,label=L][,noprefixroute=1]
#   portwright.route=IFNAME|-,DST[,KEY=VALUE]..., portwright.neigh=IFNAME,ADDRESS,MAC    see guest/pwroute.c
#   portwright.rule=4|6,PRIORITY,TABLE[,from=P][,to=P][,iif=D][,fwmark=N[/N]][,suppress_prefixlength=N]
#   portwright.httpd=PORT      serve /www
#   portwright.echo=PORT       send back what comes by TCP
#   portwright.watch=IFNAME    say on the console when its carrier comes and goes
#   portwright.host=NAME
#   root=DEVICE                go on from /sbin/init there: the kernel's word
# NICs that come later have theirs on the virtio-serial port portwright.0, a line each.
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
said=$(cat /proc/cmdline)
# The words of what was said that begin with portwright.$1=, without that.
words() { echo "$said" | tr ' ' '\n' | sed -n "s/^portwright\.$1=//p"; }

ip link set dev lo up
ip addr add 127.0.0.1/8 dev lo 2>/dev/null
for word in $(words host); do hostname "$word"; done

# By its MAC, because the kernel numbers NICs as it finds them.
nic() {
	for path in /sys/class/net/*; do
		[ "$(cat "$path/address")" = "$2" ] || continue
		found=${path##*/}
		if [ "$found" != "$1" ]; then
			# Who has the name by the kernel's count gets its own by its own words.
			[ ! -e "/sys/class/net/$1" ] || try ip link set dev "$1" name "not$1"
			try ip link set dev "$found" name "$1"
		fi
		# As a container's: no router is believed, and an address serves at once.
		for key in accept_ra accept_dad autoconf; do echo 0 >"/proc/sys/net/ipv6/conf/$1/$key"; done
		try ip link set dev "$1" mtu "$3"
		try ip link set dev "$1" up
		say "$1 is $2, mtu $(cat "/sys/class/net/$1/mtu"), queues $(ls -d "/sys/class/net/$1/queues/rx-"* | wc -l)"
		return
	done
	say "no NIC has the MAC $2"
}
addr() {
	dev=$1 text=$2 args=
	shift 2
	for word; do
		case $word in
		peer=*) text="${text%/*} peer ${word#*=}/${text#*/}" ;;
		noprefixroute=1) args="$args noprefixroute" ;;
		*) args="$args ${word%%=*} ${word#*=}" ;;
		esac
	done
	# shellcheck disable=SC2086 # words, not one
	try ip addr add $text $args dev "$dev"
}
# Wait until IPv6 addresses may be a route's source, a moment after they were added.
certain() {
	tries=0
	while [ $tries -lt 100 ] && ip -6 addr show | grep -q tentative; do
		usleep 10000
		tries=$((tries + 1))
	done
}
route() { try pwroute route "$@"; }
neigh() { try pwroute neigh "$@"; }
rule() {
	family=-$1 args="prio $2 table $3"
	shift 3
	for word; do args="$args ${word%%=*} ${word#*=}"; done
	# shellcheck disable=SC2086 # words, not one
	try ip "$family" rule add $args
}

# Set up the NICs that the words say.
# shellcheck disable=SC2046 # a word's parts are arguments
network() {
	for word in $(words nic); do (IFS=,; nic $word); done
	for kind in addr neigh route rule; do
		case $kind,$said in route,*,src=*:*) certain ;; esac
		for word in $(words $kind); do (IFS=,; set -- $word; unset IFS; "$kind" "$@"); done
	done
}

network

for word in $(words httpd); do
	[ -e /www/index.html ] || hostname >/www/index.html
	httpd -p "$word" -h /www
done
for word in $(words echo); do nc -ll -p "$word" -e cat & done

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

# NICs that come later. Their words are kept by their MACs; whichever comes second, NIC or words, sets it up.
settle() {
	for path in /sys/class/net/*; do
		mac=$(cat "$path/address" 2>/dev/null) && [ -e "/run/nics/$mac" ] || continue
		# Two look, and one gets it.
		mv "/run/nics/$mac" "/run/nics/$mac.$1" 2>/dev/null || continue
		said=$(cat "/run/nics/$mac.$1")
		rm "/run/nics/$mac.$1"
		network
	done
}
hear() {
	while read -r said; do
		mac=$(words nic | cut -d, -f2)
		echo "$said" >/run/nics/new
		mv /run/nics/new "/run/nics/$mac"
		settle hear
	done
}
listen() {
	for path in /sys/class/virtio-ports/*; do
		[ "$(cat "$path/name" 2>/dev/null)" = portwright.0 ] && mkdir /run/nics/heard 2>/dev/null || continue
		hear <"/dev/${path##*/}" &
	done
}
mkdir /run/nics
# Run for each event, because what it prints by itself it keeps until there is a bufferful.
# shellcheck disable=SC2016 # the kernel's variables, of each event
uevent sh -c 'case $SUBSYSTEM in net | virtio-ports) echo "$SUBSYSTEM" ;; esac' | while read -r what; do
	case $what in
	net) settle uevent ;;
	*) listen ;;
	esac
done &
listen

say ready
setsid cttyhack sh -l
poweroff -f
