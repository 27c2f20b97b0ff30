@0xd2b0a1c57e0f4b1d;

interface Bench {
  echo @0 (data :Data) -> (data :Data);
  give @1 (size :UInt32) -> (data :Data);
  callBack @2 (caller :Bench, data :Data) -> (data :Data);
}
