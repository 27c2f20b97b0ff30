// The open connection: requests of this side, handlers for those of the other, draining, closing, errors.

import { Channel, WINDOW } from './channel.mjs';
import { at, timeLeft } from './deadlines.mjs';
import { Cancelled, ConnectionLost, DeadlinePassed, RequestError } from './errors.mjs';
import { MAX_MESSAGE } from './handshake.mjs';
import { Entry, Outbox } from './outbox.mjs';
import { ProtocolError, cut, encodeBody, encodeContext, encodePacket } from './packets.mjs';
import { InFlight, MAX_DEPTH, MAX_DETAILS, Session } from './session.mjs';
import { Slots } from './slots.mjs';

const HEAD_ROOM = 128; // bytes of a packet that are not the user's
const MAX_CODE = 64; // bytes
const MAX_ERROR_MESSAGE = 2048; // bytes
const BATCH = 65_536; // bytes that are written at once, about
const NOTHING = Buffer.alloc(0);

/**
 * `theirs` is what the other side declared. `settings`, beside those of the handshake: handler(request) and
 * channelHandler(request), async, which return the fields of the answer or throw; window, the credit in bytes;
 * wholeUpTo and pieceSize, how packets are cut into pieces.
 */
export class Connection {
  #wire;
  #theirs;
  #settings;
  #session;
  #outbox;
  #limit;
  #nextId;
  #calls = new Map(); // our requests that wait for their answer, by id
  #handling = new Map(); // their requests whose handler has not ended, by id
  #slots = new Map(); // by class
  #unleftAtDepth0 = 0; // requests of ours that have a slot and have not left
  #pingWaiters = [];
  #pongWaits = false;
  #saidBye = false;
  #owesByeOk = false;
  #byeOkLeft = false;
  #pumping = false;
  #over = null; // why the connection is over, as a text
  #finished;
  #finish;

  constructor(wire, { client, theirs, settings }) {
    this.#wire = wire;
    this.#theirs = theirs;
    this.#settings = settings;
    const limit = theirs.maxMessageSize < settings.maxMessageSize ? theirs.maxMessageSize : settings.maxMessageSize;
    this.#limit = Number(limit);
    this.#session = new Session({ client, limit: this.#limit, maxRequests: settings.maxRequests });
    this.#outbox = new Outbox(settings);
    this.#nextId = client ? 0n : 1n;
    this.#finished = new Promise((resolve) => { this.#finish = resolve; });
  }

  start() {
    this.#wire.start((bytes, over) => this.#received(bytes, over), () => this.#wakePump());
  }

  get limit() { return this.#limit; }
  get theirs() { return this.#theirs; }
  get window() { return this.#settings.window ?? WINDOW; }
  get wire() { return this.#wire; }
  /** Resolves with the reason, a text, when the connection is over. */
  get finished() { return this.#finished; }
  /** What is in flight, to see that nothing is left over. */
  get counts() {
    return { asked: this.#calls.size, handling: this.#handling.size, theirs: this.#session.theirs.size };
  }

  // Requests of this side.

  /**
   * Ask; the promise gives the fields of the answer. `timeout` in seconds, `depth` of the request, `context` a Map
   * or null, `signal` an AbortSignal that cancels it.
   */
  async ask(fields, options = {}) {
    const call = this.#call(fields, options, null);
    return call.answer;
  }

  /** Ask for a channel: resolves, when the request has a slot, with { channel, answer, cancel() }. */
  async openChannel(fields, { window = this.window, ...options } = {}) {
    const call = this.#call(fields, options, window);
    call.answer.catch(() => {}); // who opened it may look at it later
    await call.hasSlot;
    return { channel: call.channel, answer: call.answer, cancel: () => call.cancel(new Cancelled('cancelled')) };
  }

  #call(fields, { timeout = null, depth = 0, context = null, signal = null }, window) {
    if (this.#over !== null) throw new ConnectionLost(this.#over, false);
    if (depth > MAX_DEPTH) throw new RangeError(`requests are nested ${MAX_DEPTH} deep at most`);
    signal?.throwIfAborted();
    const [body, contextField] = [encodeBody(fields), encodeContext(context)];
    this.checkSize(body.length + contextField.length);
    const deadline = timeout === null ? null : performance.now() + timeout * 1000;
    const call = { request: null, entry: null, channel: null, depth, window, size: body.length };
    call.slots = this.#slotsOf(depth, window !== null);
    call.encode = () => {
      const id = String(call.request.id);
      const head = [window === null ? 'req' : 'chan', id, timeLeft(deadline), depth ? String(depth) : '', contextField];
      return encodeBody(window === null ? [...head, body] : [...head, String(window), body]);
    };
    call.cancel = (reason) => this.#cancel(call, reason);
    call.hasSlot = new Promise((resolve, reject) => { call.gotSlot = resolve; call.gotNone = reject; });
    call.hasSlot.catch(() => {}); // a request without a channel is told by its answer alone
    call.answer = new Promise((resolve, reject) => { call.resolve = resolve; call.reject = reject; }).finally(() => {
      stopTimer?.();
      signal?.removeEventListener('abort', onAbort);
    });
    const onAbort = () => call.cancel(new Cancelled('cancelled'));
    signal?.addEventListener('abort', onAbort);
    const stopTimer = deadline === null ? null : at(deadline, () => call.cancel(new DeadlinePassed('the time is up')));
    if (this.#session.byeCame && depth === 0) this.#failCall(call, new ConnectionLost('the other side drains', false));
    else {
      call.slots.waiting.push(call);
      this.#giveSlots(call.slots);
    }
    return call;
  }

  #slotsOf(depth, hasChannel) {
    const key = `${depth} ${hasChannel}`;
    if (!this.#slots.has(key)) this.#slots.set(key, new Slots(this.#theirs, depth, hasChannel));
    return this.#slots.get(key);
  }

  #giveSlots(slots) {
    while (this.#over === null && slots.hasOne) {
      const call = slots.take();
      call.request = new InFlight(this.#nextId, call.depth, call.window === null ? null : 0, call.window);
      this.#nextId += 2n;
      call.entry = new Entry(call.request.id, 'request', call.encode, () => {
        call.request.left = true;
        this.#hasLeft(call);
      });
      if (call.window !== null) call.channel = new Channel(this, call.request);
      if (call.depth === 0) this.#unleftAtDepth0 += 1;
      this.#session.ours.set(call.request.id, call.request);
      this.#calls.set(call.request.id, call);
      this.add(call.entry);
      call.gotSlot();
    }
  }

  #freeSlot(call) {
    call.slots.free(call);
    this.#giveSlots(call.slots);
  }

  /** A request of ours no longer waits to leave: it has left, or was taken back. */
  #hasLeft(call) {
    if (call.depth !== 0) return;
    this.#unleftAtDepth0 -= 1;
    this.#sayByeOk();
  }

  #cancel(call, reason) {
    if (call.over) return;
    if (call.request === null) {
      call.slots.waiting.splice(call.slots.waiting.indexOf(call), 1);
      this.#failCall(call, reason);
      return;
    }
    this.#failCall(call, reason);
    const { id } = call.request;
    this.#outbox.takeBackItems(id);
    if (call.request.left) this.addControl(['cancel', String(id)]);
    else {
      this.#outbox.takeBack(call.entry);
      this.#session.ours.delete(id);
      this.#calls.delete(id);
      this.#hasLeft(call);
      this.#freeSlot(call);
      this.#wakePump(); // there may be a drop
    }
  }

  /** Tell the caller; the request itself may be in flight still. */
  #failCall(call, reason) {
    call.over = true;
    call.channel?.finish(reason);
    call.gotNone(reason);
    call.reject(reason);
  }

  #answered({ kind, request, body, code, message, details }) {
    const call = this.#calls.get(request.id);
    this.#calls.delete(request.id);
    this.#outbox.takeBackItems(request.id);
    this.#freeSlot(call);
    if (call.over) return; // cancelled
    if (kind === 'ok') {
      call.over = true;
      call.channel?.finish(new RangeError('the channel was answered'));
      call.resolve(body);
    } else if (code === 'closing') this.#failCall(call, new ConnectionLost('the other side closes', false));
    else this.#failCall(call, new RequestError(code, message, details));
  }

  // Requests of the other side.

  #asked({ kind, request, timeout, context, body }) {
    if (this.#saidBye && request.depth === 0) {
      this.#answerError(request, new RequestError('closing', 'this side closes the connection'));
      return;
    }
    const run = kind === 'req' ? this.#settings.handler : this.#settings.channelHandler;
    if (!run) {
      this.#answerError(request, kind === 'req' ? new RequestError('no-handler', 'no requests are handled here')
        : new RequestError('no-channel', 'no channels are handled here'));
      return;
    }
    const controller = new AbortController();
    const channel = request.hasChannel ? new Channel(this, request) : null;
    const micros = timeout === null ? null : Number(timeout);
    const stopTimer = micros === null ? () => {}
      : at(performance.now() + micros / 1000, () => controller.abort(new DeadlinePassed('the time is up')));
    this.#handling.set(request.id, { controller, channel, stopTimer });
    if (channel) channel.grant(this.window);
    const asked = {
      connection: this, fields: body, depth: request.depth, context, timeout: micros, channel, signal: controller.signal,
      ask: (fields, options = {}) => this.ask(fields, { ...options, depth: request.depth + 1 }),
    };
    Promise.resolve().then(() => run(asked)).then(
      (answer) => this.#answer(request, answer),
      (error) => this.#answerError(request, this.#asRequestError(error, controller.signal)),
    );
  }

  #answer(request, fields) {
    let body;
    try {
      body = encodeBody(fields ?? []);
    } catch (error) {
      this.#answerError(request, new RequestError('handler-error', error.message));
      return;
    }
    if (body.length > this.#limit - HEAD_ROOM) {
      this.#answerError(request, new RequestError('too-large', `an answer of ${body.length} bytes`));
    } else this.#addAnswer(request, 'ok', () => encodeBody(['ok', String(request.id), body]));
  }

  #answerError(request, { code, message, details }) {
    const text = cut(message, MAX_ERROR_MESSAGE);
    const room = this.#limit - HEAD_ROOM - Buffer.byteLength(code) - text.length;
    const kept = details.length <= room ? details : NOTHING;
    this.#addAnswer(request, 'err', () => encodeBody(['err', String(request.id), code, text, kept]));
  }

  #addAnswer(request, kind, encode) {
    const handling = this.#handling.get(request.id);
    this.#handling.delete(request.id);
    handling?.stopTimer();
    handling?.channel?.finish(new RangeError('the channel was answered'));
    this.add(new Entry(request.id, kind, encode, () => this.#session.answerLeaves(request)));
  }

  #asRequestError(error, signal) {
    if (error instanceof RequestError) {
      const wrong = wrongIn(error);
      return wrong ? new RequestError('handler-error', wrong) : error;
    }
    // What waits with a signal may wrap its reason.
    if (signal.aborted && (error === signal.reason || error?.cause === signal.reason)) {
      return new RequestError(signal.reason instanceof DeadlinePassed ? 'timeout' : 'cancelled', signal.reason.message);
    }
    return new RequestError('handler-error', String(error));
  }

  #cancelled({ request }) {
    const handling = this.#handling.get(request.id);
    if (!handling) return; // its answer is on the way
    this.#outbox.takeBackItems(request.id);
    const reason = new Cancelled('cancelled');
    handling.channel?.finish(reason);
    handling.controller.abort(reason);
    this.#wakePump();
  }

  // What is received.

  #received(bytes, over) {
    if (this.#over !== null) return;
    const events = [];
    let wrong = null;
    try {
      this.#session.receive(bytes, events);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      wrong = error;
    }
    for (const event of events) this.#act(event);
    if (this.#over !== null) return;
    if (over) {
      if (!over.error && this.#session.insidePacket) this.#end('the other side ended inside a packet');
      else this.#end(over.error ? `lost: ${over.error.message}` : 'closed by the other side');
    } else if (wrong && this.#session.aborted) this.#end(`malformed abort: ${wrong.message}`);
    else if (wrong) this.#abort(wrong.message);
    else this.#maybeClose();
  }

  #act(event) {
    const { kind, request } = event;
    if (this.#over !== null) return;
    switch (kind) {
      case 'req': case 'chan': this.#asked(event); break;
      case 'ok': case 'err': this.#answered(event); break;
      case 'cancel': this.#cancelled(event); break;
      case 'item': this.#channelOf(request)?.arrived(event); break;
      case 'credit': case 'end': this.#channelOf(request)?.changed(); break;
      case 'ping': this.#pong(); break;
      case 'pong': for (const { resolve } of this.#pingWaiters.splice(0)) resolve(); break;
      case 'bye': this.#byeCame(); break;
      case 'bye-ok': break; // the session has noted it
      case 'abort': this.#end(`aborted by the other side: ${event.code}: ${event.message}`); break;
      default: throw new Error(`nothing is done about ${kind}`);
    }
  }

  #channelOf(request) {
    return (this.#calls.get(request.id) ?? this.#handling.get(request.id))?.channel;
  }

  #pong() {
    if (this.#pongWaits) return;
    this.#pongWaits = true;
    this.addControl(['pong'], () => { this.#pongWaits = false; });
  }

  // Signs of life, draining, closing.

  /** Ask for a sign of life; resolves with the next `pong`. */
  ping() {
    if (this.#over !== null) throw new ConnectionLost(this.#over, false);
    this.addControl(['ping']);
    return new Promise((resolve, reject) => { this.#pingWaiters.push({ resolve, reject }); });
  }

  /** Finish what is in flight, take nothing new of depth 0, then close. Resolves when it is closed. */
  drain() {
    if (!this.#saidBye && this.#over === null) {
      this.#saidBye = true;
      this.addControl(['bye'], () => { this.#session.byeLeft = true; });
    }
    return this.#finished;
  }

  #byeCame() {
    for (const { depth, waiting } of this.#slots.values()) {
      if (depth > 0) continue;
      for (const call of waiting.splice(0)) this.#failCall(call, new ConnectionLost('the other side drains', false));
    }
    this.#owesByeOk = true;
    this.#sayByeOk();
  }

  #sayByeOk() {
    if (!this.#owesByeOk || this.#unleftAtDepth0 > 0) return;
    this.#owesByeOk = false;
    this.addControl(['bye-ok'], () => { this.#byeOkLeft = true; });
  }

  /** A side that drains closes as soon as nothing is in flight. */
  #maybeClose() {
    const session = this.#session;
    const done = this.#saidBye && session.byeOkCame && !session.ours.size && !this.#waitForSlots()
      && !session.theirs.size && (!session.byeCame || this.#byeOkLeft) && this.#outbox.empty;
    if (done) this.close('drained');
  }

  #waitForSlots() {
    return [...this.#slots.values()].some(({ waiting }) => waiting.length > 0);
  }

  /** Close now: requests in flight fail, handlers are cancelled. Resolves when it is closed. */
  close(reason = 'closed by this side') {
    if (this.#over === null) this.#shut(null, reason);
    return this.#finished;
  }

  #abort(message) {
    this.#shut(['abort', 'protocol', cut(message, MAX_MESSAGE)], `aborted by this side: ${message}`);
  }

  /** End this side: the packet under way is whole, as packets are written whole. */
  #shut(last, reason) {
    if (last) this.#wire.write(encodePacket(last));
    this.#wire.writeEnd();
    this.#failAll(reason);
    this.#wire.linger().then(() => this.#finish(reason));
  }

  /** The other side has ended, or the transport failed. */
  #end(reason) {
    this.#failAll(reason);
    this.#wire.close();
    this.#finish(reason);
  }

  #failAll(reason) {
    this.#over = reason;
    this.#outbox.clear();
    for (const { waiting } of this.#slots.values()) {
      for (const call of waiting.splice(0)) this.#failCall(call, new ConnectionLost(reason, false));
    }
    for (const call of this.#calls.values()) {
      if (!call.over) this.#failCall(call, new ConnectionLost(reason, call.request.left));
    }
    this.#calls.clear();
    for (const { reject } of this.#pingWaiters.splice(0)) reject(new ConnectionLost(reason, false));
    for (const { controller, channel, stopTimer } of this.#handling.values()) {
      stopTimer();
      channel?.finish(new ConnectionLost(reason, true));
      controller.abort(new Cancelled(reason));
    }
  }

  // What is sent. The first three are for channels too.

  checkSize(size) {
    if (size > this.#limit - HEAD_ROOM) throw new RangeError(`${size} bytes; ${this.#limit - HEAD_ROOM} at most`);
  }

  add(entry) {
    if (this.#over !== null) return;
    this.#outbox.add(entry);
    this.#wakePump();
  }

  addControl(fields, leaves) {
    if (this.#over !== null) return;
    this.#outbox.addControl(fields, leaves);
    this.#wakePump();
  }

  #wakePump() {
    if (this.#pumping) return;
    this.#pumping = true;
    setImmediate(() => {
      this.#pumping = false;
      this.pump();
    });
  }

  /** Hand over to the transport as much as it takes. */
  pump() {
    while (this.#over === null && this.#wire.writable) {
      const packets = [];
      let size = 0;
      while (size < BATCH) {
        const packet = this.#outbox.next();
        if (packet === null) break;
        packets.push(packet);
        size += packet.length;
      }
      if (!packets.length) break;
      this.#wire.write(Buffer.concat(packets));
    }
    if (this.#over === null) this.#maybeClose();
  }
}

/** What a handler may not put into its RequestError, or null. */
function wrongIn({ code, details }) {
  const size = Buffer.byteLength(code);
  if (size < 1 || size > MAX_CODE || code === 'closing') return `an application must not use the code '${cut(code, MAX_CODE)}'`;
  return details.length > MAX_DETAILS ? `details are ${MAX_DETAILS} bytes at most` : null;
}
