/*
 * pwroute: sets one route or one permanent neighbour in a guest, by the words of
 * docs/vm.md. The ip of busybox, which does the rest there, knows no next hops,
 * no gateway of the other family, few metrics and no neighbours.
 *
 *   pwroute route IFNAME|- DST [KEY=VALUE]...
 *   pwroute neigh IFNAME ADDRESS MAC
 *
 * Exit status 0, or 1 with a line on stderr. Numbers are the kernel's own
 * (linux/rtnetlink.h), as they were read on the host.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ROOM	2048 /* the kernel's command line has no more */
#define MAC_LEN 6

static struct {
	struct nlmsghdr head;
	union {
		struct rtmsg route;
		struct ndmsg neigh;
	} body;
	char attrs[2 * ROOM];
} request;

struct address {
	unsigned char family;
	unsigned char length; /* in bytes */
	unsigned char raw[16];
};

static void fail(const char *what, const char *why)
{
	fprintf(stderr, "pwroute: %s: %s\n", what, why);
	exit(1);
}

static void *end_of_request(void)
{
	return (char *)&request + NLMSG_ALIGN(request.head.nlmsg_len);
}

static struct rtattr *put(unsigned short type, const void *data, size_t length)
{
	struct rtattr *attr = end_of_request();
	size_t end = NLMSG_ALIGN(request.head.nlmsg_len) + RTA_SPACE(length);

	if (end > sizeof(request))
		fail("arguments", "too many");
	attr->rta_type = type;
	attr->rta_len = RTA_LENGTH(length);
	if (length)
		memcpy(RTA_DATA(attr), data, length);
	request.head.nlmsg_len = end;
	return attr;
}

static void put_u32(unsigned short type, uint32_t value)
{
	put(type, &value, sizeof(value));
}

/* What was put since is inside of it. */
static void close_nest(struct rtattr *nest)
{
	nest->rta_len = (char *)end_of_request() - (char *)nest;
}

static unsigned int number(const char *text)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 0);
	if (errno || *end || end == text || *text == '-' || value > UINT32_MAX)
		fail(text, "no number");
	return value;
}

static struct address address(const char *text)
{
	struct address found = { .family = strchr(text, ':') ? AF_INET6 : AF_INET };

	found.length = found.family == AF_INET6 ? 16 : 4;
	if (inet_pton(found.family, text, found.raw) != 1)
		fail(text, "no address");
	return found;
}

static unsigned int device(const char *name)
{
	unsigned int index = if_nametoindex(name);

	if (!index)
		fail(name, "no such device");
	return index;
}

static void put_gateway(const char *text, unsigned char family)
{
	struct address gateway = address(text);
	unsigned char via[2 + sizeof(gateway.raw)] = { gateway.family };

	if (gateway.family == family) {
		put(RTA_GATEWAY, gateway.raw, gateway.length);
		return;
	}
	memcpy(via + 2, gateway.raw, gateway.length); /* struct rtvia */
	put(RTA_VIA, via, 2 + gateway.length);
}

/* VIA@DEVICE+WEIGHT+FLAGS; no VIA for a hop without a gateway. */
static void put_hop(char *text, unsigned char family)
{
	char *name = strchr(text, '@'), *weight = name ? strchr(name, '+') : NULL;
	char *flags = weight ? strchr(weight + 1, '+') : NULL;
	struct rtnexthop *hop = end_of_request();

	if (!flags)
		fail(text, "no next hop");
	*name++ = *weight++ = *flags++ = 0;
	if (request.head.nlmsg_len + sizeof(*hop) > sizeof(request))
		fail("arguments", "too many");
	request.head.nlmsg_len += sizeof(*hop);
	hop->rtnh_flags = number(flags);
	hop->rtnh_hops = number(weight) - 1;
	hop->rtnh_ifindex = device(name);
	if (*text)
		put_gateway(text, family);
	hop->rtnh_len = (char *)end_of_request() - (char *)hop;
}

/* By number: RTAX_*. The one that is a text, congctl, has no word. */
static const char *const metrics[] = {
	[RTAX_LOCK] = "lock",
	[RTAX_MTU] = "mtu",
	[RTAX_WINDOW] = "window",
	[RTAX_RTT] = "rtt",
	[RTAX_RTTVAR] = "rttvar",
	[RTAX_SSTHRESH] = "ssthresh",
	[RTAX_CWND] = "cwnd",
	[RTAX_ADVMSS] = "advmss",
	[RTAX_REORDERING] = "reordering",
	[RTAX_HOPLIMIT] = "hoplimit",
	[RTAX_INITCWND] = "initcwnd",
	[RTAX_FEATURES] = "features",
	[RTAX_RTO_MIN] = "rto_min",
	[RTAX_INITRWND] = "initrwnd",
	[RTAX_QUICKACK] = "quickack",
	[RTAX_FASTOPEN_NO_COOKIE] = "fastopen",
};

static unsigned short metric(const char *key)
{
	for (size_t i = 0; i < sizeof(metrics) / sizeof(*metrics); i++)
		if (metrics[i] && !strcmp(metrics[i], key))
			return i;
	return 0;
}

static const char *const kinds[] = {
	[RTN_UNICAST] = "unicast",
	[RTN_LOCAL] = "local",
	[RTN_BROADCAST] = "broadcast",
	[RTN_ANYCAST] = "anycast",
	[RTN_MULTICAST] = "multicast",
	[RTN_BLACKHOLE] = "blackhole",
	[RTN_UNREACHABLE] = "unreachable",
	[RTN_PROHIBIT] = "prohibit",
	[RTN_THROW] = "throw",
};

static unsigned char kind(const char *name)
{
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		if (kinds[i] && !strcmp(kinds[i], name))
			return i;
	fail(name, "no kind of route");
	return 0;
}

/* Splits KEY=VALUE; the value. */
static char *value_of(char *word)
{
	char *equals = strchr(word, '=');

	if (!equals)
		fail(word, "no KEY=VALUE");
	*equals = 0;
	return equals + 1;
}

static void route_word(char *key, char *value, struct rtmsg *route, int *scope)
{
	if (!strcmp(key, "type"))
		route->rtm_type = kind(value);
	else if (!strcmp(key, "via"))
		put_gateway(value, route->rtm_family);
	else if (!strcmp(key, "metric"))
		put_u32(RTA_PRIORITY, number(value));
	else if (!strcmp(key, "table"))
		put_u32(RTA_TABLE, number(value));
	else if (!strcmp(key, "scope"))
		*scope = number(value);
	else if (!strcmp(key, "proto"))
		route->rtm_protocol = number(value);
	else if (!strcmp(key, "tos"))
		route->rtm_tos = number(value);
	else if (!strcmp(key, "realm"))
		put_u32(RTA_FLOW, number(value));
	else if (!strcmp(key, "pref"))
		put(RTA_PREF, &(unsigned char){ number(value) }, 1);
	else if (!strcmp(key, "onlink"))
		route->rtm_flags = number(value) ? RTNH_F_ONLINK : 0;
	else if (!strcmp(key, "src")) {
		struct address source = address(value);

		put(RTA_PREFSRC, source.raw, source.length);
	} else if (strcmp(key, "hop") && !metric(key))
		fail(key, "no word of a route");
}

static void put_route(const char *name, char *dst, char **words, int count)
{
	struct rtmsg *route = &request.body.route;
	char *length = strchr(dst, '/');
	struct rtattr *nest = NULL;
	struct address network;
	bool gateway = false;
	int scope = -1;

	if (!length)
		fail(dst, "no prefix");
	*length++ = 0;
	network = address(dst);
	request.head.nlmsg_type = RTM_NEWROUTE;
	request.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
	request.head.nlmsg_len = NLMSG_LENGTH(sizeof(*route));
	*route = (struct rtmsg){ .rtm_family = network.family,
				 .rtm_dst_len = number(length),
				 .rtm_table = RT_TABLE_MAIN,
				 .rtm_protocol = RTPROT_STATIC,
				 .rtm_type = RTN_UNICAST };
	if (route->rtm_dst_len)
		put(RTA_DST, network.raw, network.length);
	if (strcmp(name, "-"))
		put_u32(RTA_OIF, device(name));
	for (int i = 0; i < count; i++)
		if (!strncmp(words[i], "via=", 4)) {
			gateway = true;
			/* A gateway of ours is in nobody's subnet. */
			if (!strchr(words[i], ':'))
				route->rtm_flags = RTNH_F_ONLINK;
		}
	for (int i = 0; i < count; i++) {
		char *value = value_of(words[i]);

		route_word(words[i], value, route, &scope);
		gateway |= !strcmp(words[i], "hop") && *value != '@';
	}
	/* As ip has it. IPv6 has none. */
	if (scope < 0 && route->rtm_type == RTN_LOCAL)
		scope = RT_SCOPE_HOST;
	if (scope < 0)
		scope = !gateway && route->rtm_type <= RTN_MULTICAST ? RT_SCOPE_LINK
								     : RT_SCOPE_UNIVERSE;
	route->rtm_scope = network.family == AF_INET ? scope : RT_SCOPE_UNIVERSE;
	for (int i = 0; i < count; i++) {
		unsigned short what = metric(words[i]);

		if (what && !nest)
			nest = put(RTA_METRICS, NULL, 0);
		if (what)
			put_u32(what, number(words[i] + strlen(words[i]) + 1));
	}
	if (nest)
		close_nest(nest);
	nest = NULL;
	for (int i = 0; i < count; i++)
		if (!strcmp(words[i], "hop")) {
			if (!nest)
				nest = put(RTA_MULTIPATH, NULL, 0);
			put_hop(words[i] + strlen(words[i]) + 1, network.family);
		}
	if (nest)
		close_nest(nest);
}

static void put_neighbour(const char *name, const char *text, const char *mac)
{
	struct address neighbour = address(text);
	unsigned char raw[MAC_LEN];
	int end = 0;

	if (sscanf(mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx%n", &raw[0], &raw[1], &raw[2], &raw[3],
		   &raw[4], &raw[5], &end) != MAC_LEN ||
	    mac[end])
		fail(mac, "no MAC address");
	request.head.nlmsg_type = RTM_NEWNEIGH;
	request.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
	request.head.nlmsg_len = NLMSG_LENGTH(sizeof(request.body.neigh));
	request.body.neigh = (struct ndmsg){ .ndm_family = neighbour.family,
					     .ndm_ifindex = device(name),
					     .ndm_state = NUD_PERMANENT };
	put(NDA_DST, neighbour.raw, neighbour.length);
	put(NDA_LLADDR, raw, sizeof(raw));
}

/* The kernel's answer, as an errno. */
static int sent(void)
{
	struct {
		struct nlmsghdr head;
		struct nlmsgerr error;
		char rest[sizeof(request)];
	} answer;
	int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	ssize_t length;

	if (sock < 0 || send(sock, &request, request.head.nlmsg_len, 0) < 0)
		return errno;
	length = recv(sock, &answer, sizeof(answer), 0);
	if (length < 0)
		return errno;
	if ((size_t)length < NLMSG_LENGTH(sizeof(answer.error)) ||
	    answer.head.nlmsg_type != NLMSG_ERROR)
		return EPROTO;
	return -answer.error.error;
}

int main(int argc, char **argv)
{
	int error;

	if (argc >= 4 && !strcmp(argv[1], "route"))
		put_route(argv[2], argv[3], argv + 4, argc - 4);
	else if (argc == 5 && !strcmp(argv[1], "neigh"))
		put_neighbour(argv[2], argv[3], argv[4]);
	else
		fail("usage", "route IFNAME|- DST [KEY=VALUE]..., or neigh IFNAME ADDRESS MAC");
	error = sent();
	if (error)
		fail(argv[1], strerror(error));
	return 0;
}
