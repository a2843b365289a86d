/*
 * rr: request and response between two network namespaces, one byte each way, one at a time.
 *
 *     rr NETNS_A NETNS_B ADDRESS_OF_B tcp|udp MILLISECONDS CPU_A CPU_B
 *
 * The client is in A on CPU_A, the server in B on CPU_B, both blocking. Prints one JSON object:
 * {"rate": round trips per second, "p50": us, "p99": us, "count": N}. Exit status 1 with a sentence on
 * stderr if anything fails: no figure is better than a wrong one.
 */
#include "inside.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { PORT = 7007, MAX_TRIPS = 1 << 20, MIN_TRIPS = 100, WARM_UP = 200 };

static uint32_t trips[MAX_TRIPS]; /* ns */

static void serve(int tcp, int ready)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(PORT) }, peer;
	socklen_t len = sizeof(peer);
	char byte;
	int one = 1, sock = socket(AF_INET, tcp ? SOCK_STREAM : SOCK_DGRAM, 0);

	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(sock, (struct sockaddr *)&any, sizeof(any)) || (tcp && listen(sock, 1)))
		die("server");
	if (write(ready, "r", 1) != 1)
		die("ready");
	if (tcp) {
		sock = accept(sock, NULL, NULL);
		if (sock < 0 || setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
			die("accept");
		while (recv(sock, &byte, 1, 0) == 1)
			if (send(sock, &byte, 1, 0) != 1)
				die("send");
		exit(0);
	}
	for (;;)
		if (recvfrom(sock, &byte, 1, 0, (struct sockaddr *)&peer, &len) != 1 ||
		    sendto(sock, &byte, 1, 0, (struct sockaddr *)&peer, len) != 1)
			die("udp server");
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	int pipes[2], one = 1, tcp, sock;
	struct timeval patience = { .tv_sec = 5 };
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	uint64_t begun, ends, length;
	unsigned count = 0, warm = 0;
	char byte = 'x';
	pid_t server;

	if (argc != 8 || inet_pton(AF_INET, argv[3], &to.sin_addr) != 1) {
		fprintf(stderr,
			"usage: rr NETNS_A NETNS_B ADDRESS_OF_B tcp|udp MILLISECONDS CPU_A CPU_B\n");
		return 2;
	}
	tcp = !strcmp(argv[4], "tcp");
	length = (uint64_t)atoi(argv[5]) * 1000000u;
	if (pipe(pipes))
		die("pipe");
	server = fork();
	if (server < 0)
		die("fork");
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		enter(argv[2], atoi(argv[7]));
		serve(tcp, pipes[1]);
	}
	enter(argv[1], atoi(argv[6]));
	close(pipes[1]); /* a server that dies ends the read */
	if (read(pipes[0], &byte, 1) != 1)
		die("the server did not start");
	sock = socket(AF_INET, tcp ? SOCK_STREAM : SOCK_DGRAM, 0);
	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    connect(sock, (struct sockaddr *)&to, sizeof(to)) ||
	    (tcp && setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))))
		die("client");
	memset(trips, 0, sizeof(trips)); /* faults its pages in now */
	begun = now();
	ends = UINT64_MAX;
	for (uint64_t before = begun, after;
	     (before < ends || count < MIN_TRIPS) && count < MAX_TRIPS; before = after) {
		if (send(sock, &byte, 1, 0) != 1 || recv(sock, &byte, 1, 0) != 1)
			die("round trip");
		after = now();
		if (++warm == WARM_UP) { /* the time runs from here */
			begun = after;
			ends = begun + length;
		} else if (warm > WARM_UP) {
			trips[count++] = (uint32_t)(after - before);
		}
	}
	length = now() - begun;
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	qsort(trips, count, sizeof(*trips), by_value);
	printf("{\"rate\": %.1f, \"p50\": %.2f, \"p99\": %.2f, \"count\": %u}\n",
	       count * 1e9 / (double)length, trips[count / 2] / 1e3,
	       trips[(uint64_t)count * 99 / 100] / 1e3, count);
	return 0;
}
