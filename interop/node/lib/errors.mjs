// How a request can fail. "You misused me" is a RangeError or TypeError instead.

/** The answer says that the request failed. A handler throws it to say so. `details` are bytes for programs. */
export class RequestError extends Error {
  constructor(code, message, details = Buffer.alloc(0)) {
    super(message);
    this.code = code;
    this.details = details;
  }
}

/** The asker no longer wants the answer: the reason of a handler's signal, and of a call that was cancelled. */
export class Cancelled extends Error {}

/** The deadline has passed: the reason of a handler's signal, and of a call. */
export class DeadlinePassed extends Error {}

/** The connection is over, or does not take this request. `mayHaveRun` tells whether a handler can have seen it. */
export class ConnectionLost extends Error {
  constructor(message, mayHaveRun) {
    super(message);
    this.mayHaveRun = mayHaveRun;
  }
}
