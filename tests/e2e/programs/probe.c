/* Static test program of the end-to-end suites: what a shell cannot do. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static int code;

static void *late_exit(void *unused)
{
	(void)unused;
	usleep(200 * 1000);
	exit(code);
}

/* The leader ends first; the status is that of the last thread's exit_group. */
static int threaded_exit(int status)
{
	pthread_t thread;
	code = status;
	if (pthread_create(&thread, NULL, late_exit, NULL))
		return 90;
	syscall(SYS_exit, 17);
	return 91;
}

/* `bytes` bytes of a xorshift sequence; the host knows the same sequence. */
static int burst(size_t bytes, size_t block)
{
	uint32_t *buffer = malloc(block), state = 2463534242u;
	while (bytes > 0) {
		size_t count = bytes < block ? bytes : block, done = 0;
		for (size_t i = 0; i < count / 4; i++) {
			state ^= state << 13;
			state ^= state >> 17;
			state ^= state << 5;
			buffer[i] = state;
		}
		while (done < count) {
			ssize_t n = write(1, (char *)buffer + done, count - done);
			if (n < 0)
				return 92;
			done += n;
		}
		bytes -= count;
	}
	return 0;
}

/* As fast as the reader allows: the same block again and again. */
static int flood(size_t bytes, size_t block)
{
	char *buffer = malloc(block);
	memset(buffer, 'x', block);
	while (bytes > 0) {
		ssize_t n = write(1, buffer, bytes < block ? bytes : block);
		if (n < 0)
			return 92;
		bytes -= n;
	}
	return 0;
}

/* Prints every signal it gets; all are blocked by the raw call, glibc hides 32 and 33. */
static void record_signals(void)
{
	uint64_t all = ~0ull;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof(all));
	puts("ready");
	fflush(stdout);
	for (;;) {
		long got = syscall(SYS_rt_sigtimedwait, &all, NULL, NULL, sizeof(all));
		if (got > 0) {
			printf("got %ld\n", got);
			fflush(stdout);
		}
	}
}

static int eat_memory(size_t megabytes)
{
	for (size_t i = 0; i < megabytes; i++) {
		char *piece = malloc(1 << 20);
		if (!piece)
			return 93;
		for (size_t at = 0; at < 1 << 20; at += 4096)
			((volatile char *)piece)[at] = 1;
	}
	puts("survived");
	return 0;
}

static int limits(void)
{
	static const struct { const char *name; int id; } table[] = {
		{ "nofile", RLIMIT_NOFILE }, { "core", RLIMIT_CORE }, { "nproc", RLIMIT_NPROC },
		{ "fsize", RLIMIT_FSIZE },
	};
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		struct rlimit limit;
		if (getrlimit(table[i].id, &limit))
			return 94;
		printf("%s %lld %lld\n", table[i].name, (long long)limit.rlim_cur,
		       (long long)limit.rlim_max);
	}
	return 0;
}

/* Prints the error a system call gives, for seccomp tests. */
static int call_errno(long number)
{
	errno = 0;
	syscall(number, -1L, 0L, 0L, 0L);
	printf("%d\n", errno);
	return 0;
}

/* Dies of a signal, without a core file; busybox's shell ignores SIGQUIT. */
static int die_of(int signal)
{
	struct rlimit none = { 0, 0 };
	setrlimit(RLIMIT_CORE, &none);
	kill(getpid(), signal);
	sleep(2);
	return 97;
}

/* Prints the error of a connection to the abstract socket; with `own`, to one made here. */
static int abstract(const char *name, int own)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	socklen_t length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name);
	int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
	strncpy(address.sun_path + 1, name, sizeof(address.sun_path) - 2);
	if (own && (bind(server, (struct sockaddr *)&address, length) || listen(server, 1)))
		return 94;
	errno = 0;
	connect(client, (struct sockaddr *)&address, length);
	printf("%d\n", errno);
	return 0;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";
	size_t first = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
	size_t second = argc > 3 ? strtoull(argv[3], NULL, 0) : 65536;

	if (!strcmp(verb, "threaded-exit"))
		return threaded_exit((int)first);
	if (!strcmp(verb, "burst"))
		return burst(first, second);
	if (!strcmp(verb, "flood"))
		return flood(first, second);
	if (!strcmp(verb, "record-signals"))
		record_signals();
	if (!strcmp(verb, "eat-memory"))
		return eat_memory(first);
	if (!strcmp(verb, "limits"))
		return limits();
	if (!strcmp(verb, "errno"))
		return call_errno((long)first);
	if (!strcmp(verb, "abstract"))
		return abstract(argc > 2 ? argv[2] : "", argc > 3);
	if (!strcmp(verb, "raise"))
		return die_of((int)first);
	if (!strcmp(verb, "reboot"))
		return reboot(RB_AUTOBOOT) ? 95 : 96;
	if (!strcmp(verb, "exit"))
		return (int)first;
	if (!strcmp(verb, "true"))
		return 0;
	fprintf(stderr, "probe: unknown verb '%s'\n", verb);
	return 99;
}
