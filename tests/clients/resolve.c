/* Looks a name up repeatedly by the resolver of the linked C library.
 *
 * resolve NAME 4|6|0 COUNT: makes COUNT lookups, or if COUNT is 0, lookups with pauses of a millisecond until standard
 * input ends. Prints one line per failed lookup, and at the end "asked N failed N slowest N", with the slowest in
 * milliseconds. */
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static long milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits a millisecond. Returns whether the caller has closed the pipe of standard input. */
static int input_ended(void)
{
	struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
	char byte;

	return poll(&input, 1, 1) > 0 && read(STDIN_FILENO, &byte, 1) <= 0;
}

int main(int count, char **words)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	unsigned long asked = 0, failed = 0, wanted;
	long slowest = 0;

	if (count != 4) {
		fprintf(stderr, "resolve NAME 4|6|0 COUNT\n");
		return 2;
	}
	if (!strcmp(words[2], "4"))
		hints.ai_family = AF_INET;
	else if (!strcmp(words[2], "6"))
		hints.ai_family = AF_INET6;
	wanted = strtoul(words[3], NULL, 10);
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	while (wanted ? asked < wanted : !input_ended()) {
		struct addrinfo *found = NULL;
		long start = milliseconds(), took;
		int error = getaddrinfo(words[1], NULL, &hints, &found);

		took = milliseconds() - start;
		if (took > slowest)
			slowest = took;
		asked++;
		if (error) {
			failed++;
			printf("lookup %lu: %s after %ld ms\n", asked, gai_strerror(error), took);
		} else {
			freeaddrinfo(found);
		}
	}
	printf("asked %lu failed %lu slowest %ld\n", asked, failed, slowest);
	return failed ? 1 : 0;
}
