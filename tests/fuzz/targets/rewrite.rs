#![no_main]
#![doc = "See `lb_fuzz::rewrite`."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lb_fuzz::rewrite(input));
