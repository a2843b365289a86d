/*
 * taps: frames through what joins a guest's tap with a namespace's device, as a hypervisor's threads pay it.
 *
 *     taps NETNS TAP|/dev/tapN HOST_NETNS DEVICE out|in small|large MILLISECONDS CPU_GUEST CPU_HOST
 *
 * out: the guest's thread writes frames with their virtio-net headers to the tap, and a packet socket on
 * DEVICE, the other end in the host, counts what comes. in: the host's thread sends on DEVICE, and the guest's
 * thread reads the tap and counts. small: UDP datagrams of 1,400 bytes; large: super-packets of TCP, 60,000
 * bytes that are still to be cut and summed. Prints one JSON object: {"frames": a second that arrived, "gbits":
 * a second, "cpu": CPU seconds of both threads for each gigabit, softirqs that they were charged included}.
 */
#include "inside.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum {
	HEAD = sizeof(struct virtio_net_hdr),
	SMALL = 1400,
	LARGE = 60000,
	SEGMENT = 1400,
	ROOM = 1 << 17
};

struct end {
	const char *netns, *name;
	int cpu, fd;
	bool is_tap, sends, large;
	volatile uint64_t frames, octets;
};

struct state {
	double seconds, cpu;
	uint64_t sent, arrived, octets;
};

static volatile bool over;
static pthread_barrier_t ready;

static uint16_t fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static uint32_t words(const uint8_t *data, int length)
{
	uint32_t sum = 0;

	for (int i = 0; i < length; i += 2)
		sum += data[i] << 8 | data[i + 1];
	return sum;
}

/* A frame from the guest (02:00:00:00:00:02) to the host (..:03), or the other way round. */
static int build(uint8_t *frame, bool from_guest, bool large)
{
	struct virtio_net_hdr *head = (void *)frame;
	uint8_t *eth = frame + HEAD, *ip = eth + 14, *l4 = ip + 20;
	int payload = large ? LARGE : SMALL, l4_len = large ? 20 : 8,
	    length = 20 + l4_len + payload;
	uint32_t pseudo;

	memset(frame, 0, HEAD + 14 + length);
	memcpy(eth, "\2\0\0\0\0\2\2\0\0\0\0\2\x08\0", 14);
	eth[from_guest ? 5 : 11] = 3;
	memcpy(ip, "\x45\0\0\0\0\0\0\0\x40\0\0\0\xc6\x12\0\1\xc6\x12\0\2", 20);
	ip[2] = length >> 8;
	ip[3] = length;
	ip[9] = large ? 6 : 17;
	pseudo = 0xffff & ~fold(words(ip, 20));
	ip[10] = pseudo >> 8;
	ip[11] = pseudo;
	memcpy(l4, "\x27\x10\x27\x11", 4);
	if (!large) {
		l4[4] = (8 + payload) >> 8;
		l4[5] = 8 + payload;
		return HEAD + 14 + length;
	}
	l4[12] = 0x50;
	l4[13] = 0x10;
	pseudo = fold(words(ip + 12, 8) + 6 + 20 + payload);
	l4[16] = pseudo >> 8;
	l4[17] = pseudo;
	head->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	head->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
	head->hdr_len = 14 + 20 + 20;
	head->gso_size = SEGMENT;
	head->csum_start = 14 + 20;
	head->csum_offset = 16;
	return HEAD + 14 + length;
}

static int open_tap(const char *name)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	bool by_path = name[0] == '/';
	int fd = open(by_path ? name : "/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC),
	    size = HEAD;

	if (fd < 0)
		die(name);
	if (!by_path)
		strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(fd, TUNSETIFF, &request) || ioctl(fd, TUNSETVNETHDRSZ, &size) ||
	    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
		die("tap");
	return fd;
}

static int open_device(const char *name)
{
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL) };
	int one = 1, room = 8 << 20,
	    fd = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	to.sll_ifindex = if_nametoindex(name);
	if (fd < 0 || !to.sll_ifindex ||
	    setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    bind(fd, (struct sockaddr *)&to, sizeof(to)))
		die(name);
	return fd;
}

static void *run(void *given)
{
	struct end *end = given;
	uint8_t *frame = malloc(ROOM);
	struct pollfd turn = { .events = end->sends ? POLLOUT : POLLIN };
	int length = frame ? build(frame, end->is_tap, end->large) : 0;

	enter(end->netns, end->cpu);
	turn.fd = end->fd = end->is_tap ? open_tap(end->name) : open_device(end->name);
	pthread_barrier_wait(&ready);
	while (!over) {
		ssize_t done =
			end->sends ? write(end->fd, frame, length) : read(end->fd, frame, ROOM);

		if (done > HEAD + 14 &&
		    (end->sends || (frame[HEAD + 26] == 0xc6 && frame[HEAD + 29] == 1))) {
			end->frames++;
			end->octets += done - HEAD;
		} else if (done < 0 && errno == EAGAIN) {
			poll(&turn, 1, 10);
		} else if (done < 0 && errno != ENOBUFS && errno != EINTR) {
			die(end->name);
		}
	}
	return NULL;
}

static double cpu_of(pthread_t thread)
{
	struct timespec t;
	clockid_t clock;

	if (pthread_getcpuclockid(thread, &clock) || clock_gettime(clock, &t))
		die("CPU time of a thread");
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct state look(const struct end *from, const struct end *to, const pthread_t *threads)
{
	return (struct state){ .seconds = now() / 1e9,
			       .cpu = cpu_of(threads[0]) + cpu_of(threads[1]),
			       .sent = from->frames,
			       .arrived = to->frames,
			       .octets = to->octets };
}

int main(int argc, char **argv)
{
	struct end ends[2], *from, *to;
	struct state begin, end;
	pthread_t threads[2];
	bool out, large;
	double gbits;

	if (argc != 10) {
		fprintf(stderr,
			"usage: taps NETNS TAP HOST_NETNS DEVICE out|in small|large MILLISECONDS "
			"CPU_GUEST CPU_HOST\n");
		return 2;
	}
	out = !strcmp(argv[5], "out");
	large = !strcmp(argv[6], "large");
	ends[0] = (struct end){ .netns = argv[1],
				.name = argv[2],
				.cpu = atoi(argv[8]),
				.is_tap = true,
				.sends = out,
				.large = large };
	ends[1] = (struct end){ .netns = argv[3],
				.name = argv[4],
				.cpu = atoi(argv[9]),
				.sends = !out,
				.large = large };
	from = &ends[out ? 0 : 1];
	to = &ends[out ? 1 : 0];
	pthread_barrier_init(&ready, NULL, 3);
	for (int i = 0; i < 2; i++)
		if (pthread_create(&threads[i], NULL, run, &ends[i]))
			die("pthread_create");
	pthread_barrier_wait(&ready);
	/* A tap has its carrier from when it is opened, and the kernel may take a second to see that. */
	for (int waited = 0; to->frames < 100; waited++) {
		if (waited == 5000) {
			fprintf(stderr, "no frames arrive\n");
			return 1;
		}
		usleep(1000);
	}
	begin = look(from, to, threads);
	usleep(atoi(argv[7]) * 1000);
	end = look(from, to, threads);
	over = true;
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	gbits = (end.octets - begin.octets) * 8 / 1e9;
	if (gbits <= 0) {
		fprintf(stderr, "no frames arrive any more\n");
		return 1;
	}
	end.seconds -= begin.seconds;
	printf("{\"frames\": %.1f, \"gbits\": %.4f, \"cpu\": %.5f, \"sent\": %llu, \"arrived\": %llu}\n",
	       (end.arrived - begin.arrived) / end.seconds, gbits / end.seconds,
	       (end.cpu - begin.cpu) / gbits, (unsigned long long)(end.sent - begin.sent),
	       (unsigned long long)(end.arrived - begin.arrived));
	return 0;
}
