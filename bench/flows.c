/*
 * flows: what opening a flow costs between two network namespaces, and what one more packet of it.
 *
 *     flows NETNS_A NETNS_B ADDRESS_OF_B PORT CPU_A CPU_B connect MILLISECONDS
 *     flows NETNS_A NETNS_B ADDRESS_OF_B PORT CPU_A CPU_B first|next COUNT SOURCE_PORT
 *
 * connect: TCP connections, one after the other: opened, a byte each way, closed by the server. Prints
 *     {"rate": connections per second, "count": N}.
 * first: COUNT UDP datagrams, each from a source port of its own from SOURCE_PORT on: each opens a flow.
 * next: COUNT UDP datagrams of one flow, which others have opened and the receiver has answered. Both print
 *     {"ns": nanoseconds per datagram, "count": N, "arrived": N}.
 *
 * A datagram goes all its way, from the system call to the receiver's queue, on the sender's CPU before
 * the call returns (a veth pair's end is a softirq of the sender's), so the time is that of the whole
 * way. A raw socket sends them: another source port costs it nothing. Exit status 1 with a sentence on
 * stderr if anything fails: no figure is better than a wrong one.
 */
#include "inside.h"

#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { WARM_UP = 50, MIN_CONNECTIONS = 20, ROOM = 64 << 20, MAX_COUNT = 20000 };

struct datagram {
	uint16_t sport, dport, length, check;
	char payload;
} __attribute__((packed));

static struct sockaddr_in to = { .sin_family = AF_INET };

static void serve(int ready)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = to.sin_port };
	int one = 1, sock = socket(AF_INET, SOCK_STREAM, 0);
	char byte;

	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(sock, (struct sockaddr *)&any, sizeof(any)) || listen(sock, 64))
		die("server");
	if (write(ready, "r", 1) != 1)
		die("ready");
	for (;;) {
		int peer = accept(sock, NULL, NULL);

		if (peer < 0)
			die("accept");
		if (recv(peer, &byte, 1, 0) == 1 && send(peer, &byte, 1, MSG_NOSIGNAL) != 1)
			die("answer");
		close(peer);
	}
}

static void one_connection(void)
{
	struct timeval patience = { .tv_sec = 5 };
	int sock = socket(AF_INET, SOCK_STREAM, 0);
	char byte = 'x';

	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) ||
	    connect(sock, (struct sockaddr *)&to, sizeof(to)))
		die("connect");
	if (send(sock, &byte, 1, 0) != 1 || recv(sock, &byte, 1, 0) != 1 ||
	    recv(sock, &byte, 1, 0) != 0)
		die("connection");
	close(sock);
}

static int connections(char **argv)
{
	uint64_t length = (uint64_t)atoi(argv[8]) * 1000000u, begun, after;
	unsigned count = 0;
	int pipes[2];
	char byte;
	pid_t server;

	if (pipe(pipes))
		die("pipe");
	server = fork();
	if (server < 0)
		die("fork");
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		enter(argv[2], atoi(argv[6]));
		serve(pipes[1]);
	}
	enter(argv[1], atoi(argv[5]));
	close(pipes[1]); /* a server that dies ends the read */
	if (read(pipes[0], &byte, 1) != 1)
		die("the server did not start");
	for (int i = 0; i < MIN_CONNECTIONS; i++)
		one_connection();
	begun = now();
	do {
		one_connection();
		count++;
		after = now();
	} while (after < begun + length || count < MIN_CONNECTIONS);
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	printf("{\"rate\": %.1f, \"count\": %u}\n", count * 1e9 / (double)(after - begun), count);
	return 0;
}

static void send_one(int sock, struct datagram *gram, unsigned sport)
{
	gram->sport = htons((uint16_t)sport);
	if (send(sock, gram, sizeof(*gram), 0) != sizeof(*gram))
		die("send");
}

/* Takes what has arrived; for what is missing of @wanted it waits a moment, should the kernel be late. */
static unsigned drained(int sock, unsigned wanted)
{
	unsigned count = 0;
	char byte;

	while (recv(sock, &byte, 1, count < wanted ? 0 : MSG_DONTWAIT) == 1)
		count++;
	if (errno != EAGAIN)
		die("recv");
	return count;
}

/* The receiver answers, to a socket that takes it: to a connection tracker the flow is established. */
static void establish(int in, int out, struct datagram *gram, unsigned sport)
{
	struct sockaddr_in from = { .sin_family = AF_INET, .sin_port = htons((uint16_t)sport) };
	int one = 1, sock = socket(AF_INET, SOCK_DGRAM, 0);
	struct timeval patience = { .tv_sec = 5 };
	socklen_t len = sizeof(from);
	char byte;

	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    bind(sock, (struct sockaddr *)&from, sizeof(from)))
		die("sender's own socket");
	send_one(out, gram, sport);
	if (recvfrom(in, &byte, 1, 0, (struct sockaddr *)&from, &len) != 1 ||
	    sendto(in, &byte, 1, 0, (struct sockaddr *)&from, len) != 1 ||
	    recv(sock, &byte, 1, 0) != 1)
		die("the flow's answer");
	close(sock);
}

static int datagrams(char **argv, unsigned step)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = to.sin_port };
	struct datagram gram = { .dport = to.sin_port,
				 .length = htons(sizeof(gram)),
				 .payload = 'x' };
	unsigned count = (unsigned)atoi(argv[8]), sport = (unsigned)atoi(argv[9]);
	struct timeval moment = { .tv_usec = 50000 };
	unsigned arrived;
	int room = ROOM, out, in;
	uint64_t took;

	if (count < 1 || count > MAX_COUNT || sport + (count + WARM_UP) * step > 65535) {
		fprintf(stderr, "COUNT and SOURCE_PORT: 1 to %d datagrams, ports to 65535\n",
			MAX_COUNT);
		return 2;
	}
	enter(argv[2], atoi(argv[5]));
	in = socket(AF_INET, SOCK_DGRAM, 0);
	if (in < 0 || setsockopt(in, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    setsockopt(in, SOL_SOCKET, SO_RCVTIMEO, &moment, sizeof(moment)) ||
	    bind(in, (struct sockaddr *)&any, sizeof(any)))
		die("receiver");
	enter(argv[1], atoi(argv[5]));
	out = socket(AF_INET, SOCK_RAW, IPPROTO_UDP);
	if (out < 0 || connect(out, (struct sockaddr *)&to, sizeof(to)))
		die("sender");
	if (!step)
		establish(in, out, &gram, sport);
	for (unsigned i = 0; i < WARM_UP; i++, sport += step)
		send_one(out, &gram, sport);
	drained(in, WARM_UP);
	took = now();
	for (unsigned i = 0; i < count; i++, sport += step)
		send_one(out, &gram, sport);
	took = now() - took;
	arrived = drained(in, count);
	printf("{\"ns\": %.1f, \"count\": %u, \"arrived\": %u}\n", (double)took / count, count,
	       arrived);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc >= 9 && inet_pton(AF_INET, argv[3], &to.sin_addr) == 1) {
		to.sin_port = htons((uint16_t)atoi(argv[4]));
		if (argc == 9 && !strcmp(argv[7], "connect"))
			return connections(argv);
		if (argc == 10 && !strcmp(argv[7], "first"))
			return datagrams(argv, 1);
		if (argc == 10 && !strcmp(argv[7], "next"))
			return datagrams(argv, 0);
	}
	fprintf(stderr,
		"usage: flows NETNS_A NETNS_B ADDRESS_OF_B PORT CPU_A CPU_B connect MILLISECONDS\n"
		"       flows NETNS_A NETNS_B ADDRESS_OF_B PORT CPU_A CPU_B first|next COUNT SOURCE_PORT\n");
	return 2;
}
