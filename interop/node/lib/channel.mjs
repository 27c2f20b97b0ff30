// One side of a channel ("Channels" in docs/protocol.rst).

import { encodeBody } from './packets.mjs';
import { Entry } from './outbox.mjs';
import { ITEM_COST } from './session.mjs';

export const WINDOW = 262_144; // bytes of credit that the other side has at first

/** Items of a channel, both ways. `for await (const item of channel)` ends with the other side's end or the answer. */
export class Channel {
  #connection;
  #request;
  #arrived = []; // items that nobody has received yet
  #consumed = 0; // bytes of items received since the last grant
  #sending = Promise.resolve(); // sends take turns
  #wake = new Set();
  #ended = false; // this side has sent its end
  #over = null; // why neither side sends any more

  constructor(connection, request) {
    this.#connection = connection;
    this.#request = request;
  }

  /** Queue one item, as soon as the other side takes it. */
  send(fields) {
    const body = encodeBody(fields);
    this.#connection.checkSize(body.length);
    const sent = this.#sending.then(() => this.#send(body));
    this.#sending = sent.catch(() => {});
    return sent;
  }

  async #send(body) {
    this.#checkOpen();
    while (this.#request.sendCredit <= 0) {
      await this.#change();
      this.#checkOpen();
    }
    this.#request.sendCredit -= body.length + ITEM_COST;
    const { id } = this.#request;
    this.#connection.add(new Entry(id, 'item', () => encodeBody(['item', String(id), body])));
  }

  /** Say that no more items come from this side. It waits for the sends before it. */
  end() {
    const ended = this.#sending.then(() => {
      this.#checkOpen();
      this.#ended = true;
      const { id } = this.#request;
      this.#connection.add(new Entry(id, 'end', () => encodeBody(['end', String(id)])));
    });
    this.#sending = ended.catch(() => {});
    return ended;
  }

  #checkOpen() {
    if (this.#over) throw this.#over;
    if (this.#ended) throw new RangeError('this side has ended the channel');
  }

  /** The fields of the next item, or null after the last. */
  async receive() {
    while (!this.#arrived.length) {
      if (this.#over || this.#request.endCame) return null;
      await this.#change();
    }
    const { body, cost } = this.#arrived.shift();
    this.#consumed += cost;
    if (!this.#over && !this.#request.endCame && this.#consumed >= this.#connection.window / 2) {
      this.grant(this.#consumed);
      this.#consumed = 0;
    }
    return body;
  }

  async *[Symbol.asyncIterator]() {
    for (let item = await this.receive(); item !== null; item = await this.receive()) yield item;
  }

  /** Let the other side send so many bytes more. */
  grant(bytes) {
    this.#request.receiveCredit += bytes;
    this.#connection.addControl(['credit', String(this.#request.id), String(bytes)]);
  }

  // What follows is for the connection.

  /** An item has come; nobody wants it once the channel is over. */
  arrived(item) {
    if (!this.#over) this.#arrived.push(item);
    this.changed();
  }

  /** Credit or the end has come. */
  changed() {
    for (const wake of this.#wake) wake();
    this.#wake.clear();
  }

  /** Neither side sends any more: of an answer, of a cancel, of the end of the connection. */
  finish(reason) {
    this.#over ??= reason;
    this.changed();
  }

  #change() {
    return new Promise((resolve) => { this.#wake.add(resolve); });
  }
}
