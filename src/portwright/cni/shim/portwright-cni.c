/*
 * portwright-cni: the executable that CNI runtimes start.
 *
 * It holds no logic. It hands its CNI_* environment, its stdin and two network
 * namespaces (its own and CNI_NETNS) to the daemon, and prints the answer. The
 * frames are described in ../wire.py. What it does alone:
 *
 *   VERSION             answered here; the version on stdin is echoed, if one comes soon;
 *   CNI_COMMAND unset   a text about itself on stderr, exit 0;
 *   daemon not running  STATUS: error 50. ADD, CHECK and GC: error 11 at once.
 *                       DEL: written to the spool, which the daemon replays
 *                       before it serves anything, and exit 0.
 *
 * GC is not spooled: by the time the daemon read its list of what lives, the list
 * would be stale, and living pods would lose their network. A connection that
 * breaks after the request was sent is error 11 even for DEL: the daemon has
 * journalled what it began, and the runtime will ask again.
 *
 * Exit status: 0, or 1 with an error object on stdout, or what the daemon says.
 * Nothing here waits for longer than DEADLINE_S in total.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define CURRENT	    "1.1.0"
#define VERSIONS(s) "0.1.0" s "0.2.0" s "0.3.0" s "0.3.1" s "0.4.0" s "1.0.0" s CURRENT

/* Limits of ../../api/frames.py, in bytes. */
#define MAX_STDIN	(1 << 20)
#define MAX_ENV		(128 << 10)
#define MAX_PAYLOAD	(MAX_STDIN + MAX_ENV)
#define HEAD		5 /* of a frame: u32 length, u8 kind; of a reply: u8 status, u32 length */
#define MAX_SPOOLED	10000
#define DEADLINE_S	110
#define VERSION_WAIT_MS 500

enum { E_ENVIRONMENT = 4, E_IO = 5, E_DECODE = 6, E_TRY_AGAIN = 11, E_NOT_AVAILABLE = 50 };

/* ../install.py overwrites what follows the marker; volatile makes the compiler read it. */
#define SLOT_MARK_LEN 18
#define SLOT	      static const volatile char
SLOT socket_slot[SLOT_MARK_LEN + 256] = "PORTWRIGHT-SOCKET:/run/portwright/portwright.sock";
SLOT spool_slot[SLOT_MARK_LEN + 256] = "PORTWRIGHT-SPOOL=:/var/lib/portwright/spool";

static char socket_path[256], spool_path[256];
static char frame[HEAD + MAX_PAYLOAD];
static char reply[MAX_PAYLOAD];
static size_t stdin_at, payload_len; /* both from the start of the payload */
static char version[16] = CURRENT;
static const char *command;
static int64_t deadline_ns;

static int64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Wait for events on fd until the deadline; false means that it passed. */
static bool wait_for(int fd, short events)
{
	struct pollfd p = { .fd = fd, .events = events };

	for (;;) {
		int64_t left = deadline_ns - clock_ns(CLOCK_MONOTONIC);
		int n = left > 0 ? poll(&p, 1, (int)(left / 1000000 + 1)) : 0;

		if (n > 0)
			return true;
		if (n == 0 || errno != EINTR)
			return false;
	}
}

static bool write_all(int fd, const char *data, size_t len)
{
	while (len) {
		ssize_t n = write(fd, data, len);

		if (n < 0 && errno != EINTR && !(errno == EAGAIN && wait_for(fd, POLLOUT)))
			return false;
		data += n > 0 ? n : 0;
		len -= n > 0 ? n : 0;
	}
	return true;
}

/* Print the error object and exit. The text may hold anything; it is escaped here. */
__attribute__((format(printf, 2, 3))) static _Noreturn void fail(int code, const char *fmt, ...)
{
	char text[600], out[6 * sizeof(text) + 100];
	va_list ap;
	int n;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	n = snprintf(out, sizeof(out), "{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"", version,
		     code);
	for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
		if (*c < 0x20 || *c == '"' || *c == '\\' || *c >= 0x7f)
			n += snprintf(out + n, sizeof(out) - n, "\\u%04x", *c < 0x7f ? *c : '?');
		else
			out[n++] = (char)*c;
	}
	n += snprintf(out + n, sizeof(out) - n, "\"}\n");
	write_all(STDOUT_FILENO, out, n);
	exit(1);
}

/* The daemon did not answer: what each verb is told. */
static _Noreturn void no_answer(const char *why)
{
	fail(strcmp(command, "STATUS") ? E_TRY_AGAIN : E_NOT_AVAILABLE,
	     "the Portwright daemon on %s %s", socket_path, why);
}

/* Find the cniVersion in stdin, for error objects only; parsing is the daemon's. */
static void find_version(const char *text)
{
	const char *key = strcasestr(text, "\"cniVersion\"");
	char found[sizeof(version)];

	if (key && sscanf(key + strlen("\"cniVersion\""), " : \"%15[0-9.]", found) == 1)
		memcpy(version, found, sizeof(version));
}

/* Fill the payload: environment block, then stdin to its end. */
static void read_request(void)
{
	char *payload = frame + HEAD;
	size_t at = 4;
	ssize_t n = 1;
	uint32_t be;

	for (char **e = environ; *e; e++) {
		size_t len = strlen(*e) + 1;

		if (strncmp(*e, "CNI_", 4) && strncmp(*e, "TRACEPARENT=", 12) &&
		    strncmp(*e, "TRACESTATE=", 11) && strncmp(*e, "BAGGAGE=", 8))
			continue;
		if (len >= MAX_ENV - at)
			fail(E_ENVIRONMENT, "the environment is larger than %d bytes", MAX_ENV);
		memcpy(payload + at, *e, len);
		at += len;
	}
	be = htonl((uint32_t)(at - 4));
	memcpy(payload, &be, 4);
	stdin_at = at;
	while (n) {
		if (!wait_for(STDIN_FILENO, POLLIN))
			fail(E_IO, "stdin did not end within %d s", DEADLINE_S);
		/* One byte more than is allowed, to tell "full" from "too large". */
		n = read(STDIN_FILENO, payload + at, stdin_at + MAX_STDIN + 1 - at);
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			fail(E_IO, "reading stdin: %s", strerror(errno));
		at += n > 0 ? n : 0;
		if (at > stdin_at + MAX_STDIN)
			fail(E_DECODE, "stdin is larger than %d bytes", MAX_STDIN);
	}
	payload_len = at;
	find_version(payload + stdin_at); /* zero-terminated: MAX_ENV is never quite reached */
}

/*
 * Open CNI_NETNS if it is a namespace. O_NONBLOCK, because a path that names a
 * FIFO must not hang us. -1 leaves the judgement to the daemon.
 */
static int open_netns(const char *path)
{
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY) : -1;
	struct statfs fs;

	if (fd >= 0 && (fstatfs(fd, &fs) || fs.f_type != NSFS_MAGIC)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Walk to the spool, making what is missing durably, and return its descriptor. */
static int open_spool(void)
{
	int next, fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	char path[256], *save = NULL, *part;
	struct stat st;

	memcpy(path, spool_path, sizeof(path));
	for (part = strtok_r(path, "/", &save); part && fd >= 0;
	     part = strtok_r(NULL, "/", &save)) {
		if (!mkdirat(fd, part, 0700))
			fsync(fd);
		next = openat(fd, part, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		close(fd);
		fd = next;
	}
	if (fd < 0)
		fail(E_IO, "spool %s: %s", spool_path, strerror(errno));
	if (fstat(fd, &st) || st.st_uid != geteuid() || st.st_mode & 022)
		fail(E_IO, "spool %s must be ours and writable by nobody else", spool_path);
	return fd;
}

/* Keep this DEL on disk: in whole and for good, or not at all. */
static _Noreturn void spool(void)
{
	int dir = open_spool(), fd, entries = 0;
	char name[64], tmp[80];
	struct dirent *entry;
	DIR *listing = fdopendir(dup(dir));

	while (listing && (entry = readdir(listing)))
		entries += entry->d_name[0] != '.';
	if (!listing || entries >= MAX_SPOOLED)
		fail(E_TRY_AGAIN, "spool %s is full (%d); start the daemon: portwright node run",
		     spool_path, entries);
	closedir(listing);
	snprintf(name, sizeof(name), "%020lld-%d", (long long)clock_ns(CLOCK_REALTIME), getpid());
	snprintf(tmp, sizeof(tmp), ".%s.tmp", name);
	fd = openat(dir, tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd < 0 || !write_all(fd, frame + HEAD, payload_len) || fsync(fd) || close(fd) ||
	    renameat(dir, tmp, dir, name) || fsync(dir)) {
		int saved = errno;

		unlinkat(dir, tmp, 0);
		fail(E_TRY_AGAIN, "the Portwright daemon is not running and spool %s: %s",
		     spool_path, strerror(saved));
	}
	exit(0);
}

/* Nobody listens on the socket. */
static _Noreturn void daemon_away(void)
{
	const char *id = getenv("CNI_CONTAINERID"), *ifname = getenv("CNI_IFNAME");

	if (strcmp(command, "ADD") && strcmp(command, "CHECK") && strcmp(command, "DEL") &&
	    strcmp(command, "GC") && strcmp(command, "STATUS"))
		fail(E_ENVIRONMENT, "unknown CNI_COMMAND: %.200s", command);
	if (strcmp(command, "DEL"))
		no_answer("is not running; start it: portwright node run");
	/* The daemon will judge the rest, but a DEL of nothing must not be promised. */
	id = id && *id ? "" : ",CNI_CONTAINERID";
	ifname = ifname && *ifname ? "" : ",CNI_IFNAME";
	if (*id || *ifname)
		fail(E_ENVIRONMENT, "required env variables [%s%s] missing", *id ? id + 1 : id,
		     *id || !*ifname ? ifname : ifname + 1);
	if (stdin_at == payload_len)
		fail(E_DECODE, "error unmarshal network config: stdin is empty");
	spool();
}

static int connect_daemon(void)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	struct timeval patience = { .tv_sec = DEADLINE_S };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		fail(E_IO, "socket: %s", strerror(errno));
	if (strlen(socket_path) >= sizeof(sa.sun_path))
		fail(E_IO, "socket path %s is too long", socket_path);
	memcpy(sa.sun_path, socket_path, strlen(socket_path));
	/* Bounds the wait for a full backlog; see unix_stream_connect() in the kernel. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	while (connect(fd, (struct sockaddr *)&sa, sizeof(sa))) {
		if (errno == ENOENT || errno == ECONNREFUSED)
			daemon_away();
		if (errno != EINTR)
			no_answer(strerror(errno));
	}
	return fd;
}

/* Send the frame; the descriptors travel with its first byte. */
static void send_request(int sock, int own, int netns)
{
	int fds[2] = { own, netns }, count = netns < 0 ? 1 : 2;
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(fds))];
	} control = { 0 };
	struct iovec iov = { .iov_base = frame, .iov_len = HEAD + payload_len };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control };
	uint32_t be = htonl((uint32_t)payload_len);

	memcpy(frame, &be, 4);
	frame[4] = 'C';
	msg.msg_controllen = CMSG_SPACE(count * sizeof(int));
	control.align.cmsg_level = SOL_SOCKET;
	control.align.cmsg_type = SCM_RIGHTS;
	control.align.cmsg_len = CMSG_LEN(count * sizeof(int));
	memcpy(CMSG_DATA(&control.align), fds, count * sizeof(int));
	while (iov.iov_len) {
		if (!wait_for(sock, POLLOUT))
			no_answer("does not read; it may hang");
		ssize_t n = sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			no_answer(strerror(errno));
		if (n <= 0)
			continue;
		iov.iov_base = (char *)iov.iov_base + n;
		iov.iov_len -= n;
		msg.msg_control = NULL;
		msg.msg_controllen = 0;
	}
}

static void receive(int sock, char *to, size_t len)
{
	while (len) {
		if (!wait_for(sock, POLLIN))
			no_answer("did not answer in time");
		ssize_t n = recv(sock, to, len, MSG_DONTWAIT);
		if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
			no_answer("closed the connection without an answer");
		to += n > 0 ? n : 0;
		len -= n > 0 ? n : 0;
	}
}

/* Print the daemon's answer; returns the exit status. */
static int answer(int sock)
{
	const char *other_protocol = "speaks another protocol; reinstall: portwright install";
	uint32_t len, out_len;
	char head[HEAD];

	receive(sock, head, sizeof(head));
	memcpy(&len, head, 4);
	len = ntohl(len);
	if (head[4] != 'c' || len < HEAD || len > MAX_PAYLOAD)
		no_answer(other_protocol);
	receive(sock, reply, len);
	memcpy(&out_len, reply + 1, 4);
	out_len = ntohl(out_len);
	if (out_len > len - HEAD)
		no_answer(other_protocol);
	write_all(STDERR_FILENO, reply + HEAD + out_len, len - HEAD - out_len);
	/* A result that nobody received is a failure: the runtime will DEL. */
	if (!write_all(STDOUT_FILENO, reply + HEAD, out_len))
		return 1;
	return (unsigned char)reply[0];
}

/* SPEC 1.1.0 has the caller's cniVersion echoed; a caller that sends nothing is not waited for. */
static int answer_version(void)
{
	char *text = frame + HEAD, out[200];
	ssize_t n, at = 0;

	deadline_ns = clock_ns(CLOCK_MONOTONIC) + VERSION_WAIT_MS * 1000000LL;
	while (at < MAX_STDIN && !isatty(STDIN_FILENO) && wait_for(STDIN_FILENO, POLLIN)) {
		n = read(STDIN_FILENO, text + at, MAX_STDIN - at);
		if (!n || (n < 0 && errno != EINTR && errno != EAGAIN))
			break;
		at += n > 0 ? n : 0;
	}
	find_version(text); /* zero-terminated: frame is static and larger than MAX_STDIN */
	n = snprintf(out, sizeof(out), "{\"cniVersion\":\"%s\",\"supportedVersions\":[\"%s\"]}\n",
		     version, VERSIONS("\",\""));
	return !write_all(STDOUT_FILENO, out, n);
}

int main(void)
{
	int own, netns, sock;

	/* A closed standard stream must not become our socket. */
	for (int fd = 0; fd <= 2; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
			return 1;
	signal(SIGPIPE, SIG_IGN);
	deadline_ns = clock_ns(CLOCK_MONOTONIC) + DEADLINE_S * 1000000000LL;
	for (size_t i = 0; i < sizeof(socket_path) - 1; i++) {
		socket_path[i] = socket_slot[SLOT_MARK_LEN + i];
		spool_path[i] = spool_slot[SLOT_MARK_LEN + i];
	}
	command = getenv("CNI_COMMAND") ?: "";
	if (!*command) {
		dprintf(STDERR_FILENO,
			"Portwright CNI plugin: forwards to the daemon on %s\n"
			"CNI protocol versions supported: %s\n",
			socket_path, VERSIONS(", "));
		return 0;
	}
	if (!strcmp(command, "VERSION"))
		return answer_version();
	read_request();
	own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	if (own < 0)
		fail(E_IO, "/proc/self/ns/net: %s", strerror(errno));
	netns = open_netns(getenv("CNI_NETNS"));
	sock = connect_daemon();
	send_request(sock, own, netns);
	return answer(sock);
}
