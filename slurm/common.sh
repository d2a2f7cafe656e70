# shellcheck shell=bash
# What the sbatch files share: environment, ranks, threads, rendezvous, and what happens when the job is to stop.
#
# They source it from TRAINERS_ROOT, or else from the directory in which sbatch was called: Slurm runs a copy of the
# batch script, so a path relative to the script leads nowhere. No name or argument is ever evaluated as code.
set -euo pipefail

ROOT=${TRAINERS_ROOT:-$SLURM_SUBMIT_DIR}
SAVE_SECONDS=${TRAINERS_SAVE_SECONDS:-120}  # more than the longest save of a checkpoint takes
MAX_REQUEUES=${TRAINERS_MAX_REQUEUES:-50}
RESTARTS=${SLURM_RESTART_COUNT:-0}

say() { printf 'slurm: %s\n' "$*"; }
refuse() { printf 'ERROR usage: %s\n' "$*" >&2; exit 2; }

# ---- ranks: the tasks that were asked for; or else one for each GPU; or else one for each node ----
ranks_per_node() {
    if [[ -z ${SLURM_NTASKS:-} ]]; then echo "${SLURM_GPUS_ON_NODE:-1}"; return; fi
    [[ $SLURM_TASKS_PER_NODE != *,* ]] ||
        refuse "--ntasks $SLURM_NTASKS: the nodes got $SLURM_TASKS_PER_NODE tasks; ask for --ntasks-per-node"
    echo "${SLURM_TASKS_PER_NODE%%(*}"
}
threads_per_rank() {
    local threads=$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))
    echo $((threads > 0 ? threads : 1))
}
RANKS_PER_NODE=$(ranks_per_node)

# ---- environment: TRAINERS_ENV is a virtual environment, or a file to source (module load ...) ----
enter_environment() {
    local environment=${TRAINERS_ENV:-$ROOT/.venv}
    set +u  # neither activate scripts nor module functions are written for it
    # shellcheck source=/dev/null
    if [[ -f $environment/bin/activate ]]; then source "$environment/bin/activate"
    elif [[ -f $environment ]]; then source "$environment"
    elif [[ -n ${TRAINERS_ENV:-} ]]; then
        refuse "TRAINERS_ENV $environment: neither a virtual environment nor a file; make one with launch/quickstart"
    fi
    set -u
    command -v python >/dev/null || refuse "python: not found on $(hostname); set TRAINERS_ENV, see slurm/README.md"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_rank)}
    export PYTHONUNBUFFERED=1                      # what a killed rank said last is in the log
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # else restarted ranks may read the addresses of those before them
}

# ---- names: an array task goes by its array's id, for SLURM_JOB_ID can mean the whole array ----
job_key() {
    if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then echo "$SLURM_JOB_ID"
    else echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
}
flag_value() {  # --FLAG DEFAULT WORDS...: what the last --flag VALUE or --flag=VALUE says, hyphens or underscores
    local flag=$1 value=$2 word name; shift 2
    while (($#)); do
        word=$1; shift
        name=${word%%=*}
        [[ ${name//_/-} == "$flag" ]] || continue
        if [[ $word == *=* ]]; then value=${word#*=}; elif (($#)); then value=$1; fi
    done
    printf '%s\n' "$value"
}
status_file() {  # TRAINER FLAGS...: where the trainer says how it ended
    local trainer=$1 output name; shift
    output=$(flag_value --output-dir runs "$@")
    name=$(flag_value --run-name "" "$@")
    local folders=("$output/$name")
    # the name that the trainer makes, of which the recipe is not known here
    [[ -n $name ]] || folders=("$output/$(basename "$trainer" .py)"-*-"$(job_key)")
    printf '%s\n' "${folders[0]}/status.json"
}

# ---- rendezvous: the first node, and a port below the ephemeral range that two jobs on a node do not share ----
rendezvous_host() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${MASTER_ADDR:-${hosts%%$'\n'*}}"
}
rendezvous_port() { echo "${MASTER_PORT:-$((10000 + $1 % 20000))}"; }

# ---- steps: srun runs in the background, so that this script hears signals while it waits ----
STEP="" STEP_CODE=0 STOPPED_BY=""
run_step() {  # SRUN'S OPTIONS, COMMAND...: run one job step; its exit code is then in STEP_CODE
    trap 'STOPPED_BY=TERM; pass_on_stop' TERM                # Slurm cancels, preempts or requeues this job
    trap 'STOPPED_BY=${STOPPED_BY:-USR1}; pass_on_stop' USR1  # a warning that was sent to this shell alone
    # A step asks again for what it needs: srun does not know --cpus-per-task, and would take the others for its own.
    # One rank that fails, or has left after a stop, must not kill those that still save: not on a bad exit, but later.
    (unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK
     exec srun --mem=0 --kill-on-bad-exit=0 --wait="$SAVE_SECONDS" "$@") &
    STEP=$!
    while kill -0 "$STEP" 2>/dev/null; do STEP_CODE=0; wait "$STEP" || STEP_CODE=$?; done  # a signal ends wait early
}
pass_on_stop() { [[ -z $STEP ]] || kill -USR1 "$STEP" 2>/dev/null || true; }  # srun passes it on to the ranks

run_torchrun() {  # NODES RENDEZVOUS ID TORCHRUN'S FLAGS, TRAINER, ITS FLAGS...: one torchrun for each node
    local nodes=$1 rendezvous=$2 id=$3 gpus=(); shift 3
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || gpus=("--gpus-per-node=$SLURM_GPUS_ON_NODE")
    say "job $(job_key), restart $RESTARTS: $nodes node(s) of $RANKS_PER_NODE ranks on $SLURM_JOB_NODELIST," \
        "$OMP_NUM_THREADS thread(s) per rank, rendezvous at $rendezvous"
    run_step --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none "${gpus[@]}" \
        python "$ROOT/launch/node.py" --nodes "$nodes" --rendezvous "$rendezvous" --id "$id" -- \
        --nproc-per-node="$RANKS_PER_NODE" --shutdown-timeout="$SAVE_SECONDS" "$@"
}
train_on_all_nodes() {  # TRAINER FLAGS...: the usual case
    run_torchrun "$SLURM_NNODES" "$(rendezvous_host):$(rendezvous_port "$SLURM_JOB_ID")" "$(job_key)-$RESTARTS" "$@"
}

# ---- the end: status.json says how it went, for torchrun returns 1 whatever its ranks return ----
state_of() {  # STATUS.JSON: its state and reason
    python -c 'import json, sys; s = json.load(open(sys.argv[1])); print(s["state"], s["reason"])' "$1" 2>/dev/null ||
        echo "NONE"
}
stamp_of() { stat -c '%i %y' "$1" 2>/dev/null || echo none; }  # differs once the file has been replaced

conclude() {  # TRAINER FLAGS...: end with 0 (DONE), 75 (PREEMPTED: the same command resumes) or the step's code
    local state
    state=$(state_of "$(status_file "$@")")
    say "job $(job_key): ${state%% *}, step's exit code $STEP_CODE${STOPPED_BY:+, stopped by $STOPPED_BY}"
    case $STEP_CODE,${state%% *} in
        0,*) exit 0 ;;
        *,PREEMPTED) exit 75 ;;
        *) exit "$STEP_CODE" ;;
    esac
}
conclude_or_requeue() {  # STAMP-BEFORE TRAINER FLAGS...: like conclude, but a run that can be resumed is put in the queue again
    local before=$1 file state; shift
    file=$(status_file "$@")
    state=$(state_of "$file")
    [[ $STEP_CODE -gt 128 || $(stamp_of "$file") != "$before" ]] || conclude "$@"  # it failed before it began
    case $state in
        DONE*)
            # a signal that came while torchrun was leaving spoils its exit code, not the run
            [[ $(stamp_of "$file") == "$before" ]] || STEP_CODE=0
            conclude "$@" ;;
        FAILED*"ERROR distributed"*) ;;  # a rank or node was lost; what else fails would fail again
        FAILED*) conclude "$@" ;;
    esac
    [[ $STOPPED_BY != TERM ]] || conclude "$@"  # Slurm itself requeues it, or was told to cancel it
    requeue "${state%% *}"
    exit 75
}
requeue() {  # STATE: have Slurm start this job again, unless it did that already, or it was started too often
    local attempt now
    ((RESTARTS < MAX_REQUEUES)) || { say "job $(job_key): $1, and started $((RESTARTS + 1)) times: given up"; exit 75; }
    for attempt in 1 2 3 4 5 6; do  # the controller may be restarting
        if now=$(scontrol -o show job "$(job_key)"); then
            if [[ $now != *" Restarts=$RESTARTS "* ]]; then say "a later start of this job runs elsewhere"; exit 75; fi
            say "job $(job_key): $1, requeued (restart $((RESTARTS + 1)) of at most $MAX_REQUEUES)"
            if scontrol requeue "$(job_key)"; then return; fi
        fi
        sleep $((attempt * 5))
    done
    say "job $(job_key): could not be requeued; submit it again with --run-name to resume"
}
