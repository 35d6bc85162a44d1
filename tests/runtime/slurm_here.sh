#!/usr/bin/env bash
# A SLURM of one node on this machine, to try a sweep on before a cluster has it. Debian: apt-get install slurm-wlm munge
#
#     tests/runtime/slurm_here.sh start FOLDER    # all that it writes is in FOLDER; prints what to export
#     tests/runtime/slurm_here.sh stop FOLDER
#
# Started by root. No accounting; ports and sockets of its own, so that it goes beside a SLURM that is there.
set -euo pipefail

usage="usage: $0 start|stop FOLDER"
action=${1:?$usage}
folder=$(realpath -m "${2:?$usage}")

stop() {
  local daemon pid
  export SLURM_CONF=$folder/slurm.conf
  # Steps of jobs would outlive their daemon.
  squeue --noheader --format=%i 2>/dev/null | xargs --no-run-if-empty scancel || true
  for _ in $(seq 100); do
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 0.1
  done
  for daemon in slurmd slurmctld munged; do
    pid=$(cat "$folder/$daemon.pid" 2>/dev/null || true)
    # Another process may have the number by now.
    if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$daemon" ]; then
      kill "$pid"
      while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    fi
    rm -f "$folder/$daemon.pid"
  done
}

start() {
  local node port
  node=$(hostname -s)
  mkdir -p "$folder"/{state,spool}
  chmod 755 "$folder"
  [ -f "$folder/munge.key" ] || (umask 077 && dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none)
  port=$(python3 -c 'import socket
free = [socket.socket() for _ in range(2)]
for one in free: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in free))')
  # Schedules at once, and repeats a job that was put back without the two minutes of a cluster.
  cat >"$folder/slurm.conf" <<EOF
ClusterName=here
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=${port% *}
SlurmdPort=${port#* }
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
KillWait=2
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) State=UNKNOWN
PartitionName=here Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
  export SLURM_CONF=$folder/slurm.conf
  # Forced: a folder that others cannot enter will do for who starts it.
  munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --seed-file="$folder/munge.seed" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" 2>/dev/null
  slurmctld
  slurmd -N "$node"
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || break
    sleep 0.2
  done
  if [ "$(sinfo --noheader --format=%t)" != idle ]; then
    echo "error: the node did not come up: see $folder/slurmctld.log and $folder/slurmd.log" >&2
    stop
    exit 1
  fi
  echo "export SLURM_CONF=$folder/slurm.conf"
}

case $action in
  start | stop) "$action" ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
