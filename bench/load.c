/* Questions to a DNS server, many a system call, so that one core asks more than one core can
 * answer. bench/servers.py builds it.
 *
 *   load PORT FILE CLIENTS OUTSTANDING SECONDS
 *
 * FILE holds a question a line as for dnsperf, of type A or AAAA ("www.example.com A"); they are
 * put in turn, each client with ids of its own, OUTSTANDING of them unanswered among all clients.
 * Who gets no answer for half a second takes what it asked for lost. Prints: seconds, answered,
 * lost, seconds of processor time.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 64
#define ROOM 1280
#define MOST 64
#define PATIENCE 0.5

struct client {
    int waiting;            /* questions without an answer */
    unsigned short next;    /* the id of the next question */
    unsigned char open[8192]; /* a bit an id: asked and not answered */
    double heard;
};

struct question {
    size_t size;
    unsigned char *wire; /* all behind the id */
};

static struct question *questions;
static size_t count, at;
static struct client clients[MOST];
static struct pollfd sockets[MOST];
static unsigned char came[BATCH][ROOM], leaves[BATCH][ROOM];
static struct iovec into[BATCH], outof[BATCH];
static struct mmsghdr in[BATCH], out[BATCH];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double processor_time(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec +
           (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* Write a question as it is sent, without an id; return its size. */
static size_t encode(unsigned char *to, const char *name, int type)
{
    static const unsigned char head[10] = {1, 0, 0, 1}, tail[5] = {0, 0, 0, 0, 1};
    unsigned char *end = to + sizeof head;
    memcpy(to, head, sizeof head);
    for (const char *dot; *name; name = *dot ? dot + 1 : dot) {
        dot = strchrnul(name, '.');
        *end++ = dot - name;
        end = mempcpy(end, name, dot - name);
    }
    memcpy(end, tail, sizeof tail);
    end[2] = type;
    return end + sizeof tail - to;
}

static void read_questions(const char *path)
{
    FILE *f = fopen(path, "r");
    char name[256], type[8];
    size_t room = 0;
    if (!f)
        die(path);
    while (fscanf(f, "%255s %7s", name, type) == 2) {
        if (count == room) {
            room = room ? 2 * room : 1024;
            questions = realloc(questions, room * sizeof *questions);
            if (!questions)
                die("realloc");
        }
        unsigned char wire[sizeof name + 32];
        size_t size = encode(wire, name, strcmp(type, "A") ? 28 : 1);
        questions[count].size = size;
        questions[count].wire = malloc(size);
        if (!questions[count].wire)
            die("malloc");
        memcpy(questions[count++].wire, wire, size);
    }
    fclose(f);
    if (!count) {
        fprintf(stderr, "%s: no question in it\n", path);
        exit(1);
    }
}

/* Take what has come; return how many of them were answers to what was asked. */
static long take(int c, double time)
{
    struct client *client = &clients[c];
    long answered = 0;
    int n;

    do {
        n = recvmmsg(sockets[c].fd, in, BATCH, MSG_DONTWAIT, NULL);
        for (int i = 0; i < n; i++) {
            unsigned id = came[i][0] << 8 | came[i][1];
            if (in[i].msg_len < 12 || !(client->open[id >> 3] >> (id & 7) & 1))
                continue;
            client->open[id >> 3] &= ~(1 << (id & 7));
            answered++;
        }
    } while (n == BATCH);
    client->waiting -= answered;
    if (answered)
        client->heard = time;
    return answered;
}

static void ask(int c, int wanted)
{
    struct client *client = &clients[c];
    while (client->waiting < wanted) {
        int n = wanted - client->waiting < BATCH ? wanted - client->waiting : BATCH;
        for (int i = 0; i < n; i++) {
            unsigned id = client->next++;
            struct question *question = &questions[at];
            at = at + 1 == count ? 0 : at + 1;
            leaves[i][0] = id >> 8;
            leaves[i][1] = id;
            memcpy(leaves[i] + 2, question->wire, question->size);
            outof[i].iov_len = question->size + 2;
            client->open[id >> 3] |= 1 << (id & 7);
        }
        client->waiting += n;
        if (sendmmsg(sockets[c].fd, out, n, 0) < n)
            return; /* what did not leave is missed as if lost on the way */
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in server = {.sin_family = AF_INET};
    int number = argc == 6 ? atoi(argv[3]) : 0, space = 4 << 20;
    long answered = 0, lost = 0;

    if (number < 1 || number > MOST) {
        fprintf(stderr, "usage: load PORT FILE CLIENTS OUTSTANDING SECONDS\n");
        return 2;
    }
    int each = atoi(argv[4]) / number;
    double seconds = atof(argv[5]);
    read_questions(argv[2]);
    for (int i = 0; i < BATCH; i++) {
        into[i] = (struct iovec){came[i], ROOM};
        outof[i] = (struct iovec){leaves[i], 0};
        in[i].msg_hdr = (struct msghdr){.msg_iov = &into[i], .msg_iovlen = 1};
        out[i].msg_hdr = (struct msghdr){.msg_iov = &outof[i], .msg_iovlen = 1};
    }
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons(atoi(argv[1]));
    double began = now(), spent = processor_time();
    for (int c = 0; c < number; c++) {
        sockets[c].fd = socket(AF_INET, SOCK_DGRAM, 0);
        sockets[c].events = POLLIN;
        setsockopt(sockets[c].fd, SOL_SOCKET, SO_RCVBUF, &space, sizeof space);
        if (connect(sockets[c].fd, (struct sockaddr *)&server, sizeof server) < 0)
            die("connect");
        clients[c].heard = began;
        ask(c, each);
    }
    for (double time; (time = now()) - began < seconds;) {
        if (poll(sockets, number, 50) < 0)
            die("poll");
        time = now();
        for (int c = 0; c < number; c++) {
            if (sockets[c].revents)
                answered += take(c, time);
            else if (time - clients[c].heard > PATIENCE) {
                lost += clients[c].waiting;
                memset(clients[c].open, 0, sizeof clients[c].open);
                clients[c].waiting = 0;
                clients[c].heard = time;
            }
            ask(c, each);
        }
    }
    printf("%.6f %ld %ld %.6f\n", now() - began, answered, lost, processor_time() - spent);
}
