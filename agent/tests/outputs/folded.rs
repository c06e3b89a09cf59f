//! The format of folded stacks.

use flamestorm::encode::folded;
use flamestorm::profile::ResolvedProfile;

use crate::profiles;

#[test]
fn golden() {
    let text = String::from_utf8(folded::encode(&profiles::shop())).unwrap();
    profiles::assert_golden("shop.folded", &text);
}

/// Every sample is in exactly one line, whatever its names contain.
#[test]
fn no_sample_is_lost() {
    let mut b = profiles::Builder::default();
    let odd = b.location(1, &[profiles::At("odd;name\nwith breaks", "a", "", 0)]);
    b.sample(&[("comm", "a;b\nc 7")], &[odd], 5);
    b.sample(&[("pid", "9")], &[], 2);
    b.sample(&[], &[], 1);
    let text = String::from_utf8(folded::encode(&b.profile)).unwrap();
    assert_eq!(
        text,
        "[no process] 1\n[pid 9] 2\na:b c 7;odd:name with breaks 5\n"
    );
    assert_eq!(folded::encode(&ResolvedProfile::default()), b"");
}
