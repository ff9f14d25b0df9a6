#!/usr/bin/env bash
# A real Slurm on this one machine, for the tests: a controller and three nodes on loopback, as root.
#   bash up.sh packages                                          installs Debian's packages, where it can
#   bash up.sh FOLDER && export SLURM_CONF=FOLDER/slurm.conf     (about three seconds; down.sh ends it)
# - With GUARD=PID it ends by itself when that process is gone.
# - Everything lies in FOLDER: configuration, key, sockets, logs, spools. No cgroup, systemd or data base.
# - Exit code 77: no Slurm can be had here; the last line says why.
# - Nodes n1, n2, n3 have two CPUs and two make-believe GPUs (null devices) each. What runs in partition
#   'urgent' pre-empts what runs in 'main', which has GRACE seconds between SIGTERM and being requeued.
set -euo pipefail
BASE=${1:?usage: up.sh FOLDER, or up.sh packages} NODES=3 GPUS=2 GRACE=${GRACE:-20} PORTS=${PORTS:-16817}
export PATH=$PATH:/usr/sbin:/sbin

impossible() { echo "no Slurm here: $*" >&2; exit 77; }
[ "$(id -u)" = 0 ] || impossible "only root can start one that runs jobs"
PACKAGES="slurmctld slurmd slurm-client munge"
dpkg -s $PACKAGES >/dev/null 2>&1 || {
  [ "$BASE" = packages ] || impossible "its packages are missing; 'bash tests/slurm/up.sh packages' installs them"
  command -v apt-get >/dev/null || impossible "it is installed from Debian's packages"
  # RUNLEVEL: none of the packages starts its daemon.
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -qq --no-install-recommends $PACKAGES; } >&2 || impossible "apt-get cannot install $PACKAGES"
}
[ "$BASE" != packages ] || exit 0
wait_for() {
  local end=$((SECONDS + 30))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "timed out: $*" >&2; return 1; }
    sleep .1
  done
}

HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$BASE"/{state,log,run,munge}
BASE=$(cd "$BASE" && pwd)
chmod 755 "$BASE" "$BASE"/run
HOST=$(hostname -s)
export SLURM_CONF=$BASE/slurm.conf

( umask 077; head -c 128 /dev/urandom > "$BASE/munge/key" )
munged --force --key-file "$BASE/munge/key" --socket "$BASE/run/munge.socket" --pid-file "$BASE/run/munged.pid" \
  --log-file "$BASE/munge/log" --seed-file "$BASE/munge/seed" 2>"$BASE/log/munged.log"

for i in $(seq 0 $((GPUS - 1))); do
  [ -e "$BASE/gpu$i" ] || mknod -m 666 "$BASE/gpu$i" c 1 3 || impossible "devices cannot be made in $BASE"
done
echo "Name=gpu File=$BASE/gpu[0-$((GPUS - 1))]" > "$BASE/gres.conf"
cat > "$SLURM_CONF" <<CONF
ClusterName=loop
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORTS
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$BASE/run/munge.socket,cred_expire=5
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool.%n
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/slurmd.%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdTimeout=60
KillWait=10
MinJobAge=3600
$(for i in $(seq "$NODES"); do echo "NodeName=n$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORTS + i)) CPUs=2 RealMemory=64000 Gres=gpu:$GPUS State=UNKNOWN"; done)
PartitionName=main Nodes=n[1-$NODES] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=urgent Nodes=n[1-$NODES] State=UP PriorityTier=10 PreemptMode=OFF
CONF
if [ -n "${GUARD:-}" ]; then   # in a session of its own: what ends the guarded process may be sent to its group
  setsid bash -c 'while kill -0 "$0" 2>/dev/null; do sleep 2; done; exec bash "$1/down.sh" "$2"' \
    "$GUARD" "$HERE" "$BASE" </dev/null >/dev/null 2>&1 &
fi
slurmctld -c
for i in $(seq "$NODES"); do mkdir -p "$BASE/spool.n$i"; slurmd -c -N "n$i"; done
all_idle() { [ "$(timeout 10 sinfo -h -p main -o '%T %D')" = "idle $NODES" ]; }   # "idle*" has not answered yet
wait_for all_idle || { tail -n 5 "$BASE"/log/*.log >&2; exit 1; }
