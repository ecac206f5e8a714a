//! A trait that is no service is refused where it is wrong, in words that say what to do.

#[test]
fn wrong_services_are_refused_where_they_are_wrong() {
    trybuild::TestCases::new().compile_fail("tests/wrong_services/*.rs");
}
