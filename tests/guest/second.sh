#!/bin/bash
# Second stage, on the host's user land: NICs with soft-RoCE, then the command; its exit code goes into the exchange folder.
#
# Two hosts of RAILS rails each in one network namespace (soft-RoCE of 6.1 looks its routes up in the first one only): NICs a0.. and
# b0.. are the two ends of cables (the first is between the machine's own NICs, where it has two), rxea0.. and rxeb0.. the RDMA devices
# on them. Pulling one, `ip link set a0 down`, works as on a cable.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exchange=/run/guest
mkdir -p /dev/pts /dev/shm /dev/infiniband
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
ip link set lo up
. $exchange/settings.sh
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = out ] && out=/dev/$(basename "$port")
done

rails() {
    set -e
    for module in virtio_net ib_uverbs rdma_ucm rdma_rxe dummy veth; do modprobe $module; done
    sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.all.accept_local=1 \
        net.ipv4.conf.default.accept_local=1 net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2
    for ((i = 0; i < RAILS; i++)); do
        if [ $i = 0 ] && [ -e /sys/class/net/eth1 ]; then
            ip link set eth0 name a0
            ip link set eth1 name b0
        else
            ip link add a$i mtu 9000 type veth peer name b$i mtu 9000
        fi
        ip addr add 10.78.$i.1/24 dev a$i
        ip addr add 10.78.$i.2/24 dev b$i
        ip link set a$i up
        ip link set b$i up
        rdma link add rxea$i type rxe netdev a$i
        rdma link add rxeb$i type rxe netdev b$i
    done
}

{
    code=125
    if (rails); then
        touch $exchange/ready
        ulimit -l unlimited
        ulimit -c 0
        cd "$FOLDER" && { timeout -k 5 "$SECONDS_ALLOWED" bash $exchange/command.sh < /dev/null; code=$?; }
    else
        echo "guest: no soft-RoCE; the kernel says:"
        dmesg | tail -n 12
    fi
    echo $code > $exchange/code
} 2>&1 | cat > "${out:-/dev/console}"
dmesg > $exchange/dmesg.txt
sync
exec /run/busybox poweroff -f # static and in memory: bash lies on a file system that goes away first
