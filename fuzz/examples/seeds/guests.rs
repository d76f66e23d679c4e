//! Guests that drive a device by the book, and a little beside it.

use tern_fuzz::Disk;
use vmm::devices::virtio::exercise::Exercise;
use vmm::devices::virtio::exercise::script::{
    FAR, FLIP, FROM_END, HUGE, INDIRECT, LOOP, POSITIONS, Part, SECTORS, Script, TABLE, WAIT, WRITABLE,
};

use super::Target;

const DATA: u16 = 0x1100;
/// How a request can be made.
const WAYS: [u8; 4] = [0, INDIRECT, LOOP, WAIT];

/// A request of a disk: type, sector, data.
fn disk(kind: u8, sector: u8, data: Option<Part>) -> Vec<Part> {
    let mut header = [0; 16];
    (header[0], header[8]) = (kind, sector);
    let status = Part::new(WRITABLE, 0x1080, 1);
    [Some(Part::filled(0x1000, header)), data, Some(status)].into_iter().flatten().collect()
}

/// One range of a discard, or of a write of zeros.
fn range(sector: u8, sectors: u8, unmap: bool) -> Part {
    let mut bytes = [0; 16];
    (bytes[0], bytes[8], bytes[12]) = (sector, sectors, u8::from(unmap));
    Part::filled(DATA, bytes)
}

fn disk_guests() -> Vec<Vec<u8>> {
    let into = Part::new(SECTORS | WRITABLE, DATA, 8);
    let requests = [
        disk(0, 1, Some(into)),
        disk(1, 2, Some(Part::new(SECTORS, DATA, 8))),
        disk(4, 0, None),
        disk(8, 0, Some(Part::new(WRITABLE, DATA, 20))),
        disk(11, 0, Some(range(4, 8, false))),
        disk(13, 0, Some(range(4, 8, true))),
        disk(13, 0, Some(range(4, 8, false))),
        disk(0, 1, Some(Part::new(HUGE | WRITABLE, DATA, 2))),
        disk(0, 1, Some(Part::new(SECTORS | WRITABLE | FROM_END, 512, 2))),
        disk(0, 1, Some(Part::new(SECTORS | WRITABLE | FAR, 1, 2))),
        disk(0, 1, Some(Part::new(TABLE, DATA, 32))),
        disk(0, 127, Some(into)),
        disk(99, 0, Some(into)),
    ];
    let mut guests = one_each(0, &requests);
    // All of them one after the other, then with write-back off, then after a move.
    let all = |script: Script| requests.iter().fold(script, |script, parts| script.request(0, 0, parts));
    guests.push(all(Script::live()).bytes());
    guests.push(all(Script::live().config(32, 1, [0; 8])).save(0, 0, 0).bytes());
    guests.push(all(all(Script::live().save(0, 0, 0)).again(0, 3)).bytes());
    guests
}

fn one_each(queue: u8, requests: &[Vec<Part>]) -> Vec<Vec<u8>> {
    let with =
        |how| requests.iter().map(move |parts| Script::live().request(queue, how, parts).look().bytes());
    WAYS.into_iter().flat_map(with).collect()
}

fn net_guests() -> Vec<Vec<u8>> {
    let (room, packet) = (Part::new(WRITABLE, DATA, 1526), Part::new(0, DATA, 74));
    let big = vec![Part::new(HUGE | WRITABLE, 0x2000, 1), Part::new(WRITABLE, 0x3000, 300)];
    let mut guests = one_each(1, &[vec![packet], vec![Part::filled(0x1000, [1; 16]), packet]]);
    for arrives in [7, 37, 757, 2000, 32_787] {
        for parts in [vec![room], big.clone()] {
            guests.push(Script::live().request(0, 0, &parts).arrive(arrives).bytes());
            guests.push(Script::live().arrive(arrives).request(0, 0, &parts).bytes());
        }
        // Without merged buffers; and merged from several.
        guests.push(Script::default().set_up(1 << 15, 4).request(0, 0, &big).arrive(arrives).bytes());
        // Without room.
        guests.push(Script::live().request(0, 0, &[room.with_length(0)]).arrive(arrives).bytes());
        let several = (0..4).fold(Script::live(), |s, _| s.request(0, WAIT, &[room]));
        guests.push(several.arrive(arrives).save(0, 0, 0).arrive(arrives).bytes());
    }
    guests
}

fn console_guests() -> Vec<Vec<u8>> {
    let mut guests = one_each(1, &[vec![Part::filled(DATA, [b'x'; 16])], vec![Part::new(HUGE, DATA, 1)]]);
    for arrives in [1, 100, 5000] {
        let script = Script::live().arrive(arrives).request(0, 0, &[Part::new(WRITABLE, DATA, 64)]);
        guests.push(script.save(0, 0, 0).again(0, 1).bytes());
    }
    guests
}

fn balloon_guests() -> Vec<Vec<u8>> {
    let mut numbers = [0; 16];
    (numbers[0], numbers[4], numbers[8], numbers[13]) = (0x60, 0x61, 0x70, 1);
    let pages = vec![Part::filled(DATA, numbers)];
    let mut guests = [0, 1]
        .into_iter()
        .flat_map(|queue| one_each(queue, std::slice::from_ref(&pages)))
        .collect::<Vec<_>>();
    let reports = [
        vec![Part::new(WRITABLE | HUGE, 0x1000, 1)],
        vec![Part::new(WRITABLE, 0x1001, 5000), Part::new(WRITABLE | FROM_END, 8192, 8192)],
        vec![Part::new(WRITABLE | HUGE | FROM_END, 4096, 0xffff)],
    ];
    guests.extend(one_each(2, &reports));
    guests.push(Script::live().config(4, 4, [1; 8]).request(0, 0, &pages).save(0, 0, 0).bytes());
    guests
}

fn rng_guests() -> Vec<Vec<u8>> {
    let mut guests = one_each(
        0,
        &[
            vec![Part::new(WRITABLE, DATA, 64)],
            vec![Part::new(WRITABLE | HUGE, 0x1000, 3)],
            vec![Part::new(WRITABLE, DATA, 64), Part::new(WRITABLE | FLIP, 0x2000, 1)],
            vec![Part::new(WRITABLE, DATA, 4), Part::new(0, DATA, 4)],
            vec![Part::new(WRITABLE | FROM_END, 1, 2)],
        ],
    );
    // A state that lies; a queue that goes around; a queue of one entry; registers before their time.
    let request = [Part::new(WRITABLE, DATA, 64)];
    for (at, value) in [(0, 0), (0xffff, 0xffff), (5, 9)] {
        guests.push(Script::live().save(POSITIONS, at, value).request(0, 0, &request).again(0, 40).bytes());
    }
    guests.push(Script::live().save(2, 12, 0xff).save(2, 40, 1).request(0, 0, &request).bytes());
    guests.push(Script::default().set_up(0, 0).request(0, 0, &request).again(0, 200).bytes());
    guests.push(Script::default().register(0x70, 1).register(0x44, 1).register(0x50, 0).read(0, 4).bytes());
    guests.push(Script::live().register(0x44, 0).request(0, 0, &request).register(0x70, 0).look().bytes());
    guests.push(Script::live().put(0x2000, [0xff; 16]).put(0x2200, [0xff; 16]).look().bytes());
    guests
}

fn runs(exercise: &Exercise, guest: &[u8]) -> bool {
    exercise.run(guest).is_ok()
}

pub(super) fn all() -> Vec<Target> {
    let guests = [net_guests(), console_guests(), balloon_guests(), rng_guests(), disk_guests()];
    let race = guests
        .iter()
        .zip(0u8..)
        .flat_map(|(all, which)| all.iter().map(move |guest| [&[which], &guest[..]].concat()));
    let race = Target { name: "virtio_race", seeds: race.collect(), takes: |_| true };
    let [net, console, balloon, rng, block] = guests;
    let target = |name, seeds, takes| Target { name, seeds, takes };
    vec![
        race,
        target("virtio_net", net, |guest| runs(&Exercise::net(), guest)),
        target("virtio_console", console, |guest| runs(&Exercise::console(), guest)),
        target("virtio_balloon", balloon, |guest| runs(&Exercise::balloon(), guest)),
        target("virtio_rng", rng, |guest| runs(&Exercise::rng(), guest)),
        target("virtio_block", block, |guest| runs(&Disk::new().device, guest)),
    ]
}
