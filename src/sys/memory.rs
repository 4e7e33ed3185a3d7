//! Memory that an idle process need not hold.

use std::ffi::{c_int, c_void};

use nix::libc;

const PAGE: u64 = 4096;

/// Returns free heap to the kernel, and lets go of the pages of code and constants: they stay in the page
/// cache, from where those that are used again are mapped again, and the kernel may take the others.
pub fn give_back() {
    // SAFETY: it only takes glibc's own locks.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback is called during this call only, with valid descriptions of what is loaded.
    unsafe { libc::dl_iterate_phdr(Some(drop_clean), std::ptr::null_mut()) };
}

/// For one program or library.
unsafe extern "C" fn drop_clean(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr(3) gives a valid pointer, and `dlpi_phnum` program headers at `dlpi_phdr`.
    let (info, headers) = unsafe {
        let info = &*info;
        (info, std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)))
    };
    for header in headers {
        if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0 {
            // Whole pages only: what shares a page with it may have been written to.
            let begin = info.dlpi_addr + header.p_vaddr;
            let (start, end) = (begin.next_multiple_of(PAGE), begin + header.p_memsz);
            let length = (end - end % PAGE).saturating_sub(start);
            // SAFETY: a private mapping of a file that cannot be written to: its pages are those of the
            // file, and come back from it when they are used. The kernel refuses what is no such mapping,
            // and, where pages are larger, what does not begin with one.
            unsafe {
                libc::madvise(start as *mut c_void, length as usize, libc::MADV_DONTNEED);
            }
        }
    }
    0
}
