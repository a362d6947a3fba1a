#!/bin/sh
# The guest's first process. Its root becomes the host's, read-only beneath a layer that is thrown away.
export PATH=/bin
/bin/busybox --install -s /bin
fail() { echo "guest: $*" > /dev/console; dmesg | tail -n 20 > /dev/console; poweroff -f; }
mount -t devtmpfs dev /dev && mount -t proc proc /proc && mount -t sysfs sys /sys
while read -r module; do insmod "$module" || fail "insmod $module"; done < /modules.boot
mkdir -p /host /layer /exchange /root.new
how=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $how,ro,cache=loose host /host || fail "no root of the host"
mount -t 9p -o $how,cache=none exchange /exchange || fail "no exchange folder"
mount -t tmpfs -o mode=755,size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work over /root.new || fail "no overlay"
cd /root.new && mkdir -p dev proc sys run lib/modules
for place in dev proc sys; do mount --move /$place /root.new/$place; done
mount -t tmpfs -o mode=755 run run
mkdir run/guest run/modules
cp /bin/busybox run/
mount --move /exchange run/guest || fail "the exchange folder does not move"
cp -a /lib/modules/. run/modules/ && mount --bind run/modules lib/modules || fail "no modules"
exec switch_root /root.new /bin/bash /run/guest/second.sh < dev/null > dev/console 2>&1
