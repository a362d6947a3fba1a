/* Which steps of a connection at_fab_stepped lets pass: prints "FROM TO" for each, as the numbers of its states. Built as if there were a
 * sanitizer. Its arguments: the flags (ep, joined, begun, heard) of each state. */
#include "fabric/fabric.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static int passes(int from, const char *flags) {
    pid_t child = fork();
    if (child == 0) {
        at_fab fab = {.fd = -1};
        at_fab_conn conn = {.fab = &fab, .state = from, .joined = flags[1] == 'x', .begun = flags[2] == 'x', .heard = flags[3] == 'x'};
        conn.ep = flags[0] == 'x' ? &fab : NULL;
        const struct rlimit none = {0, 0};
        if (setrlimit(RLIMIT_CORE, &none) != 0 || freopen("/dev/null", "w", stderr) == NULL) _exit(2);
        at_fab_stepped(&conn);
        _exit(0);
    }
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child) exit(1);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char **argv) {
    for (int from = AT_CONN_CLOSED; from <= AT_CONN_UP; from++)
        for (int to = 1; to < argc; to++)
            if (strlen(argv[to]) == 4 && passes(from, argv[to])) printf("%d %s\n", from, argv[to]);
    return 0;
}
