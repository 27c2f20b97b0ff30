// Deadlines, as moments of performance.now() ("Deadlines" in docs/protocol.rst).

const MAX_TIMEOUT = 1e17; // microseconds; more is as good as none
const MAX_TIMER = 2 ** 31 - 1; // ms that setTimeout can wait: it takes more for none at all

/** What `timeout` says when the packet begins to leave. `deadline` may be null. */
export function timeLeft(deadline) {
  if (deadline === null) return '';
  const micros = Math.max(0, Math.floor((deadline - performance.now()) * 1000));
  return micros > MAX_TIMEOUT ? '' : String(micros);
}

/** Call back at that moment, however far away it is; the function that is returned stops it. */
export function at(moment, call) {
  let timer;
  const wait = () => {
    const left = Math.max(0, Math.ceil(moment - performance.now()));
    timer = setTimeout(() => (performance.now() < moment ? wait() : call()), Math.min(left, MAX_TIMER));
  };
  wait();
  return () => clearTimeout(timer);
}
