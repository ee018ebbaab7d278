#![no_main]
#![doc = "See `lb_packet_checks::rewrite`."]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lb_packet_checks::rewrite(input));
