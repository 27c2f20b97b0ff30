// Packets, and what stands in their fields: numbers, texts, pairs ("Packets" in docs/protocol.rst).
// Encoders throw RangeError or TypeError, as the caller is at fault; decoders throw ProtocolError.

import { isUtf8 } from 'node:buffer';

export const MAX_FIELDS = 255;
export const MAX_OPTIONS_SIZE = 96; // bytes, the count and the sizes included
export const MAX_CONTEXT_SIZE = 8192; // bytes, likewise
export const MAX_CONTEXT_PAIRS = 32;
export const MAX_USER_SIZE = 255; // bytes of UTF-8

const NUMBER = /^(?:0|[1-9][0-9]{0,17})$/;
const OPTION_NAME = /^[a-z0-9./-]{1,32}$/;
const CONTEXT_NAME = /^[a-z0-9._-]{1,64}$/;

/** The other side broke the protocol. */
export class ProtocolError extends Error {}

/** The body of a packet with these fields (a list of Buffers and strings), without its length. */
export function encodeBody(fields) {
  if (fields.length > MAX_FIELDS) throw new RangeError(`${fields.length} fields; ${MAX_FIELDS} at most`);
  const parts = [Buffer.of(fields.length)];
  for (const field of fields) {
    const bytes = Buffer.from(field);
    parts.push(u32(bytes.length), bytes);
  }
  return Buffer.concat(parts);
}

/** The body with its length before it. */
export function withLength(body) {
  return Buffer.concat([u32(body.length), body]);
}

/** The whole packet with these fields. */
export function encodePacket(fields) {
  return withLength(encodeBody(fields));
}

/** The fields of a body, as Buffers. */
export function decodeBody(body) {
  if (body.length === 0) throw new ProtocolError('empty packet');
  const fields = [];
  let at = 1;
  for (let left = body[0]; left > 0; left -= 1) {
    if (body.length - at < 4) throw new ProtocolError('packet ends inside a size');
    const end = at + 4 + body.readUInt32BE(at);
    if (end > body.length) throw new ProtocolError('packet ends inside a field');
    fields.push(body.subarray(at + 4, end));
    at = end;
  }
  if (at !== body.length) throw new ProtocolError('bytes after the last field of a packet');
  return fields;
}

/** The number in a field, as a BigInt: it may have 18 digits, more than a double holds. */
export function decodeNumber(field, what) {
  const text = field.toString('latin1');
  if (!NUMBER.test(text)) throw new ProtocolError(`invalid ${what}`);
  return BigInt(text);
}

/** The text in a field. */
export function decodeText(field, what) {
  if (!isUtf8(field)) throw new ProtocolError(`${what} is not UTF-8`);
  return field.toString('utf8');
}

/** The text as UTF-8 of `size` bytes at most, cut between two characters. */
export function cut(text, size) {
  const bytes = Buffer.from(text.toWellFormed());
  if (bytes.length <= size) return bytes;
  let end = size;
  while ((bytes[end] & 0xc0) === 0x80) end -= 1;
  return bytes.subarray(0, end);
}

/** The options in a field, as a Map of names to Buffers. */
export function decodeOptions(field) {
  if (field.length > MAX_OPTIONS_SIZE) throw new ProtocolError('options are too long');
  return decodePairs(field, OPTION_NAME, 'options');
}

export function encodeOptions(options) {
  const body = encodePairs(options, OPTION_NAME, 'option');
  if (body.length > MAX_OPTIONS_SIZE) throw new RangeError(`options of more than ${MAX_OPTIONS_SIZE} bytes`);
  return body;
}

/** The context in a field: a Map of names to Buffers, or null where there is none. */
export function decodeContext(field) {
  if (field.length === 0) return null;
  if (field.length > MAX_CONTEXT_SIZE) throw new ProtocolError('context is too long');
  const context = decodePairs(field, CONTEXT_NAME, 'context');
  if (context.size === 0 || context.size > MAX_CONTEXT_PAIRS) throw new ProtocolError('context of 0 or too many pairs');
  return context;
}

export function encodeContext(context) {
  if (context === null) return Buffer.alloc(0);
  if (context.size === 0 || context.size > MAX_CONTEXT_PAIRS) {
    throw new RangeError(`a context has 1 to ${MAX_CONTEXT_PAIRS} pairs`);
  }
  const body = encodePairs(context, CONTEXT_NAME, 'context');
  if (body.length > MAX_CONTEXT_SIZE) throw new RangeError(`context of more than ${MAX_CONTEXT_SIZE} bytes`);
  return body;
}

/** The bytes of a user name; RangeError if it is none. */
export function encodeUser(user) {
  const bytes = Buffer.from(user, 'utf8');
  if (!user.isWellFormed() || userIn(bytes) === null) throw new RangeError('invalid user name');
  return bytes;
}

/** The user name in these bytes, or null if it is none: that is no error, but the name of nobody. */
export function userIn(bytes) {
  if (bytes.length < 1 || bytes.length > MAX_USER_SIZE || !isUtf8(bytes)) return null;
  const user = bytes.toString('utf8');
  return user.normalize('NFC') === user && !/\p{Cc}/u.test(user) ? user : null;
}

function decodePairs(body, nameRule, what) {
  const fields = decodeBody(body);
  if (fields.length % 2) throw new ProtocolError(`a name without a value in ${what}`);
  const pairs = new Map();
  for (let i = 0; i < fields.length; i += 2) {
    const name = fields[i].toString('latin1');
    if (!nameRule.test(name)) throw new ProtocolError(`invalid name in ${what}`);
    if (pairs.has(name)) throw new ProtocolError(`the same name twice in ${what}`);
    pairs.set(name, fields[i + 1]);
  }
  return pairs;
}

function encodePairs(pairs, nameRule, what) {
  for (const name of pairs.keys()) if (!nameRule.test(name)) throw new RangeError(`invalid ${what} name`);
  return encodeBody([...pairs].flat());
}

function u32(number) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(number);
  return bytes;
}
