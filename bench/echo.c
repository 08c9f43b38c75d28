/* The limit of the socket: a bare UDP echo that sets QR, in batches. bench/run.py builds it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define BATCH 64
#define SIZE 2048

int main(int argc, char **argv)
{
    static char buffers[BATCH][SIZE];
    static struct sockaddr_in peers[BATCH];
    static struct iovec vectors[BATCH];
    static struct mmsghdr messages[BATCH];
    struct sockaddr_in own = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_DGRAM, 0), space = 4 << 20;

    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    own.sin_port = htons(argc > 1 ? atoi(argv[1]) : 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &space, sizeof space);
    if (bind(fd, (struct sockaddr *)&own, sizeof own) < 0) {
        perror("bind");
        return 1;
    }
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            vectors[i] = (struct iovec){buffers[i], SIZE};
            messages[i].msg_hdr = (struct msghdr){
                .msg_name = &peers[i], .msg_namelen = sizeof peers[i],
                .msg_iov = &vectors[i], .msg_iovlen = 1};
        }
        int n = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
        for (int i = 0; i < n; i++) {
            vectors[i].iov_len = messages[i].msg_len;
            if (messages[i].msg_len > 2)
                buffers[i][2] |= 0x80;
        }
        for (int sent = 0; sent < n;) {
            int k = sendmmsg(fd, messages + sent, n - sent, 0);
            if (k < 0)
                break;
            sent += k;
        }
    }
}
