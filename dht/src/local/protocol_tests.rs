//! Every message survives the wire; what is no message is refused.

use proptest::prelude::*;

use super::*;

fn requests() -> impl Strategy<Value = Request> {
    let extent = (any::<u64>(), any::<u64>(), any::<u64>())
        .prop_map(|(first_gfn, pages, file_offset)| MemoryExtent { first_gfn, pages, file_offset });
    prop_oneof![
        any::<u16>().prop_map(|version| Request::Hello { version }),
        (".{0,40}", prop::collection::vec(extent, 0..5))
            .prop_map(|(name, extents)| Request::Register { name, extents }),
        prop::collection::vec(any::<u64>().prop_map(ShortId), 0..50).prop_map(|ids| Request::Resolve { ids }),
        any::<u64>().prop_map(|id| Request::ReportWrong { id: ShortId(id) }),
        Just(Request::Status),
        prop::collection::vec(1u8.., 1..60)
            .prop_map(|path| Request::AddFile { path: OsString::from_vec(path).into() }),
        any::<u64>().prop_map(|id| Request::Locate { id: ShortId(id) }),
        Just(Request::Retain),
    ]
}

fn answers() -> impl Strategy<Value = Answer> {
    let ids = prop::collection::vec(any::<u64>().prop_map(ShortId), 0..50);
    let rung = prop_oneof![Just(FoundOn::Host), Just(FoundOn::Site)];
    let page = (any::<u64>(), any::<u8>()).prop_map(|(id, fill)| (ShortId(id), Box::new([fill; PAGE_SIZE])));
    let holder = (rung.clone(), "[0-9A-Za-z]{0,60}", ".{0,30}").prop_map(|(rung, peer_id, what)| Holder {
        rung,
        peer_id,
        what,
    });
    prop_oneof![
        (any::<u16>(), prop::array::uniform32(any::<u8>()), "[0-9A-Za-z]{0,60}").prop_map(
            |(version, half, peer_id)| {
                let mut block = [0; 64];
                block[32..].copy_from_slice(&half);
                Answer::Welcome { version, domain: DomainBlock(block), peer_id }
            }
        ),
        Just(Answer::Done),
        (rung, prop::collection::vec(page, 0..4)).prop_map(|(rung, pages)| Answer::Pages { rung, pages }),
        ids.prop_map(|ids| Answer::Missing { ids }),
        prop::collection::vec(any::<u8>(), 0..99).prop_map(|json| Answer::Status { json }),
        any::<u64>().prop_map(|pages| Answer::FileAdded { pages }),
        any::<(u64, u64)>().prop_map(|(pages, bytes)| Answer::Retained { pages, bytes }),
        prop::collection::vec(holder, 0..5).prop_map(|holders| Answer::Located { holders }),
        ".{0,60}".prop_map(|message| Answer::Failed { code: FailureCode::Full, message }),
    ]
}

proptest! {
    #[test]
    fn requests_survive_the_wire_and_no_prefix_is_a_frame(request in requests()) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let (frame, used) = take_frame(&bytes).unwrap().unwrap();
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!(Request::decode(frame).unwrap(), request);
        for cut in 0..bytes.len() {
            prop_assert_eq!(take_frame(&bytes[..cut]).unwrap(), None);
        }
    }

    #[test]
    fn answers_survive_the_wire_and_shortened_ones_are_refused(answer in answers(), cut in any::<prop::sample::Index>()) {
        let mut bytes = Vec::new();
        answer.encode(&mut bytes);
        let (frame, _) = take_frame(&bytes).unwrap().unwrap();
        prop_assert_eq!(Answer::decode(frame).unwrap(), answer);
        if !frame.body.is_empty() {
            let short = &frame.body[..cut.index(frame.body.len())];
            let refused = Answer::decode(Frame { kind: frame.kind, body: short }).is_err();
            prop_assert!(refused);
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in any::<u8>()) {
        if let Ok(Some((frame, used))) = take_frame(&bytes) {
            prop_assert!(used <= bytes.len());
            let _ = (Request::decode(frame).is_ok(), Answer::decode(frame).is_ok());
        }
        let frame = Frame { kind, body: &bytes };
        let _ = (Request::decode(frame).is_ok(), Answer::decode(frame).is_ok());
    }
}

#[test]
fn a_length_beyond_the_bound_is_refused_before_the_body_arrives() {
    let error = take_frame(&u32::MAX.to_be_bytes()).unwrap_err();
    assert!(matches!(error, CodecError::TooLarge { field: "frame length", .. }), "{error}");
    assert!(take_frame(&[0, 0, 0, 0]).is_err());
}

#[test]
fn a_lying_count_is_refused_before_memory_is_reserved() {
    let mut body = Vec::new();
    put_count(&mut body, LOCAL_RESOLVE_IDS);
    let error = Request::decode(Frame { kind: RESOLVE, body: &body }).unwrap_err();
    assert_eq!(error, CodecError::Truncated { field: "ids" });
    let error = Answer::decode(Frame { kind: MISSING, body: &body }).unwrap_err();
    assert_eq!(error, CodecError::Truncated { field: "ids" });
}
